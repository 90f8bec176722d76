"""What an optimizer step takes for a while does not grow with the experts that a rank holds.

Source: Singh et al. 2023 (arXiv:2303.06318), section 4.1: an untiled step of a large shard took gigabytes.
"""

from __future__ import annotations

from unittest import mock

import pytest

from megatron3d.train.step import Rates, train_step
from megatron3d.zero import full_parameters
from tests.dist.pool import Pool
from tests.planner.measured import allocations_of, batches_of, config_of, parts_of

H, F = 256, 128
FEW, MANY = 4, 12
MODEL = (
    f"--num-layers 1 --hidden-size {H} --num-attention-heads 4 --seq-length 8 --vocab-size 64 --micro-batch-size 1 "
    f"--global-batch-size 2 --moe-ffn-hidden-size {F} --activation gelu --disable-bias-linear"
)
OPTIMIZERS = (
    "adamw",
    "adamw --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
    "sgd --sgd-momentum 0.9",
    "lion",
    "lamb",
    "adafactor",
    "muon",
)
MATRIX, FP64 = 4 * F * H, 8


def step_peak(rank: int, world_size: int, optimizer: str, experts: int, layout: str) -> int:
    """Bytes that the second step of an optimizer takes at most beside what is there before."""
    config = config_of(f"{MODEL} --num-experts {experts} --optimizer {optimizer} {layout}", world_size)
    parts, rates = parts_of(config), Rates(lr=1e-3, weight_decay=0.1)
    first, second = batches_of(config, parts, 2)
    train_step(parts, first, rates, step=0)
    peaks, step = [], parts.optimizer.step
    with mock.patch.object(parts.optimizer, "step", lambda: peaks.append(allocations_of(step).peak)):
        train_step(parts, second, rates, step=1)
    (peak,) = peaks
    return peak


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_temporaries_of_a_step_do_not_grow_with_the_number_of_experts(optimizer: str) -> None:
    few, many = (step_peak(0, 1, optimizer, experts, "") for experts in (FEW, MANY))
    # Sums travel in one exchange: of a matrix two numbers, and for Adafactor one for each row and column.
    sums = FP64 * (H + F + 2 if optimizer == "adafactor" else 16)
    matrices = 2 * (MANY - FEW)
    assert many - few <= 4 * sums * matrices < matrices * MATRIX / 4, (few, many)


def in_tiles(rank: int, world_size: int, experts: int) -> int:
    with mock.patch.object(full_parameters, "TILE_CPU", F * H):
        return step_peak(rank, world_size, "muon", experts, "--expert-model-parallel-size 1 --zero-stage 1")


def test_matrices_that_are_exchanged_take_the_memory_of_a_tile(pool: Pool) -> None:
    few, many = (pool.run(2, in_tiles, experts) for experts in (FEW, MANY))
    for one, other in zip(few, many, strict=True):
        assert other - one <= MATRIX / 4, (few, many)
