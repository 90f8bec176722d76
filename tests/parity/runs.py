"""Short training runs whose losses, gradient norms and first gradients are compared between layouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from megatron3d.data.build import build_gpt_data
from megatron3d.data.loader import GlobalBatches
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.params.boxes import Box
from megatron3d.train.parts import Parts, build_parts
from megatron3d.train.step import Rates, forward_backward, global_counts, train_step

VOCAB_SIZE = 101  # not a multiple of any degree: every layout pads differently
NUM_STEPS = 20
RATES = Rates(lr=2e-3, weight_decay=0.1)

SHAPE = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
    "--global-batch-size 8 --train-iters 20 --lr 2e-3 --mock-data --eod-mask-loss --hidden-dropout 0 "
    "--attention-dropout 0 --make-vocab-size-divisible-by 4 --num-workers 0 --device cpu --clip-grad 0.5 "
    f"--vocab-size {VOCAB_SIZE}"
)
MODELS = {
    "gpt2": "",
    "gpt2-deep": "--num-layers 8",
    "gpt2-untied": "--untie-embeddings-and-output-weights",
    "llama": (
        "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
        "--untie-embeddings-and-output-weights --ffn-hidden-size 64"
    ),
    "llama-tied": (
        "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
        "--ffn-hidden-size 64 --qk-layernorm"
    ),
}


@dataclass(frozen=True)
class Case:
    """A model, a layout, and the options that must not change a result."""

    model: str
    layout: Layout
    options: str = ""

    def __str__(self) -> str:
        return f"{self.model:12s} {self.layout!s:18s} {self.options}"


@dataclass(frozen=True)
class Trace:
    """What a run gave: loss and gradient norm of each step, and the first step's gradients as (box, values)."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, list[tuple[Box, Tensor]]]


def config_of(case: Case) -> RunConfig:
    """The resolved config of a case."""
    # One process takes the batch sample by sample, layouts in pairs where they can: that must not matter either.
    micro_batch = 2 if case.layout.world_size > 1 and case.layout.dp <= 4 else 1
    layout = case.layout
    degrees = f"--tensor-model-parallel-size {layout.tp} --pipeline-model-parallel-size {layout.pp}"
    argv = f"{SHAPE} {MODELS[case.model]} --micro-batch-size {micro_batch} {degrees} {case.options}".split()
    return resolve(parse_args(argv, program="test", description="test"), case.layout.world_size)


def parts_of(case: Case, mesh: Mesh) -> Parts:
    """The parts of a case on a live mesh."""
    return build_parts(config_of(case), mesh, torch.device("cpu"), build_gpt_stage)


def trace(parts: Parts, *, num_steps: int = NUM_STEPS) -> Trace:
    """Train for some steps on mock data at a constant rate."""
    config, dp = parts.config, parts.mesh.dp
    data = build_gpt_data(config.data, seq_length=config.model.seq_length, vocab_size=VOCAB_SIZE, eod_token=0)
    losses, norms, gradients = [], [], {}
    size = config.train.global_batch_size
    with GlobalBatches(data.reader(data.train), num_workers=config.data.num_workers) as batches:
        first = batches.read(0, size, dp.rank, dp.size)
        forward_backward(parts, first, global_counts(parts, first), step=0)
        parts.engine.finish_reduce()
        for name, view in parts.engine.grad_views().items():
            gradients[name] = [(box, piece.clone()) for box, piece in view.pieces()]
        parts.engine.clear_grads()
        for step in range(num_steps):
            result = train_step(parts, batches.read(step * size, size, dp.rank, dp.size), RATES, step=step)
            losses.append(result.loss)
            norms.append(result.grad_norm)
    return Trace(losses, norms, gradients)


def trace_cases(rank: int, world_size: int, cases: list[Case]) -> list[Trace]:
    """Body of a worker: the traces of several cases of one world size."""
    return [trace(parts_of(case, make_mesh(case.layout))) for case in cases]


def assemble(traces: list[Trace], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Full gradients from the boxes of all ranks; elements that no rank holds stay NaN and so cannot compare equal."""
    full = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for one in traces:
        for name, pieces in one.gradients.items():
            for box, values in pieces:
                full[name][box.slices()] = values
    return full
