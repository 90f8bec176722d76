"""A step of 50,000 tokens over four ranks takes each of them at most 0.3 of the memory that one process takes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megatron3d.planner.ledger import ledger_of
from megatron3d.planner.stage_records import StageRecords
from megatron3d.train.plan import plan_of
from megatron3d.train.step import Rates, train_step
from tests.dist.pool import Pool
from tests.planner.measured import allocations_of, batches_of, config_of, parts_of

SHAPE = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 50000 --vocab-size 512 "
    "--position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 --micro-batch-size 1 --global-batch-size 1"
)
KINDS = ("p2p", "a2a", "a2a+p2p --hierarchical-context-parallel-sizes 2 2", "allgather --cp-gather-again")
MOST = 0.3


def _flags(kind: str) -> str:
    return f"{SHAPE} --context-parallel-size 4 --cp-comm-type {kind}"


def _predicted(flags: str, world_size: int) -> int:
    """Bytes at the highest moment of a step, without the state."""
    config = config_of(flags, world_size)
    forecast = ledger_of(StageRecords(config, "cpu"), plan_of(config))[0]
    return forecast.activations + forecast.buffers


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_says_that_a_rank_of_four_takes_at_most_three_tenths(kind: str) -> None:
    assert _predicted(_flags(kind), 4) <= MOST * _predicted(SHAPE, 1)


@dataclass(frozen=True)
class _Step:
    loss: float
    grown: int


def _one_step(rank: int, world_size: int, flags: str) -> _Step:
    """The loss of a first step, and the highest sum of what it allocates."""
    config = config_of(flags, world_size)
    parts = parts_of(config)
    (batch,) = batches_of(config, parts, 1)
    losses: list[float] = []
    rates = Rates(lr=1e-3, weight_decay=0.1)
    seen = allocations_of(lambda: losses.append(train_step(parts, batch, rates, step=0).loss))
    return _Step(losses[0], seen.peak)


@pytest.mark.slow
def test_a_rank_of_four_allocates_at_most_three_tenths_of_what_one_process_does_for_the_same_loss(pool: Pool) -> None:
    (alone,) = pool.run(1, _one_step, SHAPE, timeout_s=900)
    for kind in KINDS:
        for rank, found in enumerate(pool.run(4, _one_step, _flags(kind), timeout_s=900)):
            print(f"{kind}, rank {rank}: {found.grown / 2**20:.0f} MiB of {alone.grown / 2**20:.0f} MiB")
            assert found.loss == pytest.approx(alone.loss, rel=1e-5)
            assert found.grown <= MOST * alone.grown, f"{kind}, rank {rank}: {found.grown} of {alone.grown} bytes"
