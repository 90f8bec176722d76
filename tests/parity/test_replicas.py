"""Replicas stay equal to the last bit at every layout, and one flipped bit in one of them is found and named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.errors import NumericsError
from megatron3d.train import state
from megatron3d.train.setup import TrainingSetup
from tests.dist.pool import Pool
from tests.parity.runs import Case, parts_of, trace

NUM_STEPS = 2
SP = "--sequence-parallel"
NORM, MATRIX, TABLE = "layers.0.attention_norm.weight", "layers.1.mlp.up.weight", "embedding.word.weight"

# Every optimizer and precision, each at a layout where much is held more than once.
HEALTHY = [
    Case("gpt2", Layout(dp=2), "--bf16"),
    Case("gpt2", Layout(dp=2), "--offload-optimizer cpu --overlap-param-gather"),
    Case("llama", Layout(tp=2), f"{SP} --optimizer lion"),
    Case("bert", Layout(tp=2), ""),
    Case("gpt2", Layout(pp=2), "--fp16 --initial-loss-scale 4194304"),
    Case("gpt2", Layout(tp=2, dp=2), f"{SP} --optimizer muon"),
    Case("gpt2", Layout(tp=2, dp=2), "--optimizer adafactor"),
    Case("llama", Layout(tp=2, dp=2), f"{SP} --optimizer lamb --zero-stage 2"),
    Case("bert", Layout(pp=2, dp=2), "--bf16 --zero-stage 1 --overlap-param-gather"),
    Case("gpt2", Layout(dp=4, zero_shard=2), "--bf16 --zero-stage 3 --zero-shard-size 2"),
    Case("gpt2", Layout(tp=2, pp=2, dp=2), f"{SP} --zero-stage 1"),
    Case("gpt2", Layout(tp=2, pp=2, dp=2), "--optimizer adafactor"),
]


@dataclass(frozen=True)
class Flip:
    """One bit that is wrong on one rank: of the weights that layers read ("weights"), of what is updated ("model"), or
    of a kind of optimizer state, in the part of a parameter that the rank has."""

    rank: int
    kind: str
    parameter: str


def _checked(rank: int, world_size: int, cases: list[Case]) -> None:
    for case in cases:
        parts = parts_of(case, make_mesh(case.layout))
        trace(parts, num_steps=NUM_STEPS)
        state.check_replicas(parts, NUM_STEPS)


@pytest.mark.parametrize("size", sorted({case.layout.world_size for case in HEALTHY}))
def test_replicas_are_equal_to_the_last_bit_after_steps(pool: Pool, size: int) -> None:
    pool.run(size, _checked, [case for case in HEALTHY if case.layout.world_size == size])


def _values(parts: TrainingSetup, flip: Flip) -> Tensor:
    engine = parts.engine
    if flip.kind == "model":
        return engine.weight_views()[flip.parameter].data
    if flip.kind != "weights":
        return engine.state_views(parts.optimizer, flip.kind)[flip.parameter].data
    slots = {slot.spec.name: (unit, slot) for unit in engine.units.values() for slot in unit.layout.slots}
    unit, slot = slots[flip.parameter]
    return unit.weights.full[slot.span.slice]


def _message_after(rank: int, world_size: int, case: Case, flip: Flip) -> str:
    parts = parts_of(case, make_mesh(case.layout))
    trace(parts, num_steps=NUM_STEPS)
    if rank == flip.rank:
        values = _values(parts, flip)
        values.view(torch.int32 if values.itemsize == 4 else torch.int16)[-1] ^= 1
    try:
        state.check_replicas(parts, NUM_STEPS)
    except NumericsError as error:
        return str(error)
    return "nothing was found"


@pytest.mark.parametrize(
    ("case", "flip", "clause"),
    [
        (Case("gpt2", Layout(dp=2)), Flip(1, "weights", MATRIX), f"weights/{MATRIX}: rank 1 against rank 0"),
        (Case("gpt2", Layout(dp=2)), Flip(0, "exp_avg_sq", MATRIX), f"exp_avg_sq/{MATRIX}: rank 1 against rank 0"),
        (Case("gpt2", Layout(dp=4)), Flip(2, "weights", MATRIX), f"weights/{MATRIX}: rank 2 against ranks 0, 1, 3"),
        (
            Case("gpt2", Layout(dp=2), "--bf16 --zero-stage 2"),
            Flip(1, "weights", MATRIX),
            f"weights/{MATRIX}: rank 1 against rank 0",
        ),
        (
            Case("gpt2", Layout(dp=4, zero_shard=2), "--bf16 --zero-stage 3 --zero-shard-size 2"),
            Flip(3, "model", TABLE),
            f"model/{TABLE}: rank 3 against rank 1",
        ),
        (Case("llama", Layout(tp=2), SP), Flip(1, "model", NORM), f"weights/{NORM}: rank 1 against rank 0"),
        (
            Case("gpt2", Layout(tp=2, dp=2), f"{SP} --zero-stage 1"),
            Flip(3, "weights", NORM),
            f"weights/{NORM}: rank 3 against rank 1; weights/{NORM}: rank 3 against rank 2. Nothing is saved",
        ),
        (Case("gpt2", Layout(pp=2)), Flip(1, "exp_avg", TABLE), f"exp_avg/{TABLE}: rank 1 against rank 0"),
        (
            Case("gpt2", Layout(tp=2, pp=2), SP),
            Flip(2, "weights", TABLE),
            f"weights/{TABLE}: rank 2 against rank 0",
        ),
    ],
    ids=str,
)
def test_a_flipped_bit_in_one_replica_is_named_on_every_rank(pool: Pool, case: Case, flip: Flip, clause: str) -> None:
    messages = pool.run(case.layout.world_size, _message_after, case, flip)
    assert len(set(messages)) == 1
    assert clause in messages[0] and f"after step {NUM_STEPS}" in messages[0], messages[0]


def test_what_one_rank_alone_holds_cannot_differ(pool: Pool) -> None:
    """A part that ZeRO gives to one rank has no replica: the same flip is then training as usual."""
    case = Case("gpt2", Layout(dp=2), "--bf16 --zero-stage 3")
    assert set(pool.run(2, _message_after, case, Flip(1, "exp_avg", TABLE))) == {"nothing was found"}
