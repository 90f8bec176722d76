"""One training step with every allocation seen: what torch's allocator was asked for and freed, in order.

`torch.profiler` reports each allocation of the CPU allocator, temporaries inside operators included. The highest sum
from the start of the step on, with the bytes of the state that was there before, is the measured peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile

from megatron3d.comm.mesh import make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from megatron3d.data.batch import Samples
from megatron3d.data.build import build_data
from megatron3d.data.loader import GlobalBatches
from megatron3d.models.zoo import architecture_of
from megatron3d.optim.build import state_bytes
from megatron3d.planner.layout import layout_of
from megatron3d.planner.memory import StateForecast, shard_size
from megatron3d.train.setup import TrainingSetup, build_parts
from megatron3d.train.step import Rates, train_step

COMMON = "--train-iters 3 --lr 1e-3 --mock-data --num-workers 0 --device cpu"


@dataclass(frozen=True)
class Allocations:
    """The highest sum of allocations from the start on, the sum at the end, and every change in order; bytes."""

    peak: int
    left: int
    changes: tuple[int, ...]


@dataclass(frozen=True)
class Held:
    """The state of one rank as allocated, and which rank it is: along the pipeline, and of those that share state."""

    pp_rank: int
    shard_rank: int
    state: StateForecast


@dataclass(frozen=True)
class Measured:
    """One rank: its state, and the peak of a step with what of it is on the device."""

    held: Held
    peak: int


def allocations_of(action: Callable[[], object], *, leaves_nothing: bool = False) -> Allocations:
    """Run `action` and follow the allocator of the CPU; `leaves_nothing` says that it frees all it takes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    events = _allocations(recorded.profiler.kineto_results.experimental_event_tree())
    changes = tuple(_changes(sorted(events, key=lambda one: one.start_time_ns), leaves_nothing=leaves_nothing))
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return Allocations(peak, now, changes)


def _allocations(events: Sequence[_ProfilerEvent]) -> Iterator[_ProfilerEvent]:
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def _changes(events: Sequence[_ProfilerEvent], *, leaves_nothing: bool) -> Iterator[int]:
    """Bytes allocated or freed, in order.

    Now and then a thread of gloo is the last to let go of a collective's copy, and does so unseen. That the copy is
    gone shows when its address is taken again, or at the end of what leaves nothing. Such a copy counts at the moment
    at which it is taken; hundreds of its like, whose ends are seen, show how long they live.
    """
    held: dict[int, int] = {}
    unseen: set[int] = set()
    for number, event in enumerate(events):
        before = held.pop(event.typed[1].ptr, None)
        if event.typed[1].alloc_size > 0:
            held[event.typed[1].ptr] = number
            if before is not None:
                unseen.add(before)
    unseen |= set(held.values()) if leaves_nothing else set()
    for number, event in enumerate(events):
        yield event.typed[1].alloc_size
        if number in unseen:
            yield -event.typed[1].alloc_size


def config_of(flags: str, world_size: int, *, architecture: str = "gpt") -> RunConfig:
    """The resolved config of a command line."""
    words = parse_args(f"{COMMON} {flags}".split(), program="test", description="test", architecture=architecture)
    return resolve(words, world_size)


def hold_all(rank: int, world_size: int, cases: list[tuple[str, str]]) -> list[Held]:
    """Body of a worker: the state of this rank for each (architecture, flags)."""
    return [_held_by(config_of(flags, world_size, architecture=kind)) for kind, flags in cases]


def measure_all(rank: int, world_size: int, cases: list[tuple[str, str]]) -> list[Measured]:
    """Body of a worker: state and peak of this rank for each (architecture, flags)."""
    return [measure(config_of(flags, world_size, architecture=kind)) for kind, flags in cases]


def measure(config: RunConfig) -> Measured:
    """Make two steps of a config on this rank, the second of them followed."""
    parts, rates = parts_of(config), Rates(lr=1e-3, weight_decay=0.1)
    first, second = batches_of(config, parts, 2)
    train_step(parts, first, rates, step=0)
    seen = allocations_of(lambda: train_step(parts, second, rates, step=1), leaves_nothing=True)
    held = held_of(parts)
    return Measured(held, held.state.on_device + seen.peak)


def _held_by(config: RunConfig) -> Held:
    """The state of a rank that has just been built, or, where staging buffers come with use, after a step."""
    parts = parts_of(config)
    if config.parallel.offload_optimizer != "none":
        train_step(parts, batches_of(config, parts, 1)[0], Rates(lr=1e-3, weight_decay=0.1), step=0)
        parts.engine.finish_update()  # while a delayed update runs, the optimizer shows the records on the host
    return held_of(parts)


def parts_of(config: RunConfig) -> TrainingSetup:
    """Build this rank."""
    mesh = make_mesh(layout_of(config.parallel, query_groups=config.model.num_query_groups))
    return build_parts(config, mesh, torch.device("cpu"), architecture_of(config.model).build_stage)


def batches_of(config: RunConfig, parts: TrainingSetup, number: int) -> list[Samples]:
    """This rank's part of the first global batches."""
    model, size, readers = config.model, config.train.global_batch_size, parts.mesh.batch
    data = build_data(config.data, model, tokenizer=None, eod_token=0)
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        return [batches.read(step * size, size, readers.rank, readers.size) for step in range(number)]


def held_of(parts: TrainingSetup) -> Held:
    """What the engine and the optimizer say they hold."""
    found = parts.engine.state_bytes()
    state = StateForecast(
        weights=found.weights,
        gradients=found.gradients,
        master_weights=found.master_weights,
        moments=state_bytes(parts.optimizer),
        host=found.host,
        files=found.files,
    )
    shares = shard_size(parts.config.parallel) > 1
    return Held(parts.mesh.pp.rank, parts.mesh.shard.rank if shares else 0, state)
