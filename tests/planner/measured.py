"""One training step with every allocation seen: what torch's allocator was asked for and gave back, in order.

`torch.profiler` reports each allocation of the CPU allocator, temporaries inside operators included. The highest sum
from the start of the step on, with the bytes of the state that was there before, is the measured peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from megatron3d.data.build import build_bert_data, build_gpt_data
from megatron3d.data.loader import GlobalBatches
from megatron3d.models.zoo import BUILDERS
from megatron3d.optim.build import state_bytes
from megatron3d.train.parts import Parts, build_parts
from megatron3d.train.step import Rates, train_step

COMMON = "--train-iters 3 --lr 1e-3 --mock-data --num-workers 0 --device cpu"
EVENT = "[memory]"


@dataclass(frozen=True)
class Allocations:
    """The highest sum of allocations from the start on, the sum at the end, and every change in order; bytes."""

    peak: int
    left: int
    changes: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """One rank: bytes of its state by kind as allocated, and the peak of a step with them."""

    pp_rank: int
    shard_rank: int
    weights: int
    gradients: int
    master_weights: int
    moments: int
    host: int
    files: int
    transient: int
    peak: int


def allocations_of(action: Callable[[], object]) -> Allocations:
    """Run `action` and follow the allocator of the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == EVENT]
    changes = tuple(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return Allocations(peak, now, changes)


def config_of(flags: str, world_size: int, *, architecture: str = "gpt") -> RunConfig:
    """The resolved config of a command line."""
    words = parse_args(f"{COMMON} {flags}".split(), program="test", description="test", architecture=architecture)
    return resolve(words, world_size)


def layout_of(config: RunConfig) -> Layout:
    """The layout of a resolved config."""
    parallel = config.parallel
    return Layout(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        dp=parallel.data_parallel_size,
        zero_shard=parallel.zero_shard_size,
    )


def measure_all(rank: int, world_size: int, cases: list[tuple[str, str]]) -> list[Measured]:
    """Body of a worker: state and peak of this rank for each (architecture, flags)."""
    return [measure(config_of(flags, world_size, architecture=kind)) for kind, flags in cases]


def measure(config: RunConfig) -> Measured:
    """Make two steps of a config on this rank, the second of them followed."""
    mesh = make_mesh(layout_of(config))
    parts = build_parts(config, mesh, torch.device("cpu"), BUILDERS[config.model.architecture])
    size, rates = config.train.global_batch_size, Rates(lr=1e-3, weight_decay=0.1)
    with _batches(config) as batches:
        given = [batches.read(step * size, size, mesh.dp.rank, mesh.dp.size) for step in range(2)]
    train_step(parts, given[0], rates, step=0)
    seen = allocations_of(lambda: train_step(parts, given[1], rates, step=1))
    return _with_peak(parts, seen)


def _batches(config: RunConfig) -> GlobalBatches:
    model = config.model
    sizes = {"seq_length": model.seq_length, "vocab_size": model.vocab_size}
    if model.architecture == "bert":
        data = build_bert_data(config.data, **sizes, tokenizer=None, binary_head=model.has_binary_head)
    else:
        data = build_gpt_data(config.data, **sizes, eod_token=0)
    return GlobalBatches(data.reader(data.train), num_workers=0)


def _with_peak(parts: Parts, seen: Allocations) -> Measured:
    held, moments = parts.engine.state_bytes(), state_bytes(parts.optimizer)
    state = held.weights + held.gradients + held.master_weights + moments
    return Measured(
        pp_rank=parts.mesh.pp.rank,
        shard_rank=parts.mesh.shard.rank,
        weights=held.weights,
        gradients=held.gradients,
        master_weights=held.master_weights,
        moments=moments,
        host=held.host,
        files=held.files,
        transient=held.transient_peak,
        peak=state + seen.peak,
    )
