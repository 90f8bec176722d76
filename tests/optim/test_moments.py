"""Moments in bf16 follow those in fp32, which rounding to the nearest would not, and depend on no layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron3d_kernels.rounding import threshold
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.build import build_optimizer, set_rates, state_bytes
from megatron3d.optim.moments import read_moment, write_moment

BF16_STEP = 2.0**-7  # largest distance of two neighbours in bf16, relative to the smaller


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 12), st.integers(0, 2**20))
def test_any_run_of_steps_of_a_power_of_two_has_one_threshold_in_each_equal_part(power: int, start: int) -> None:
    length = 1 << power
    thresholds = sorted(threshold(start * length + number) for number in range(length))
    parts = [value * length >> 16 for value in thresholds]
    assert parts == list(range(length))


@given(st.floats(2.0**-100, 2.0**100), st.booleans())
def test_a_value_is_rounded_up_as_often_as_it_lies_far_from_the_lower_neighbour(size: float, negative: bool) -> None:
    value = torch.tensor([-size if negative else size])
    total, num_steps = 0.0, 256
    for count in range(num_steps):
        stored = torch.zeros(1, dtype=torch.bfloat16)
        write_moment(stored, value.clone(), count=count)
        total += float(stored)
        assert abs(float(stored) - float(value)) <= BF16_STEP * abs(float(value))
    # 256 thresholds hit the share of the interval to 1/256 of it.
    assert abs(total / num_steps - float(value)) <= BF16_STEP * abs(float(value)) / num_steps * 1.001


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8), st.integers(0, 10**6))
def test_values_that_bf16_holds_are_kept_as_they_are(values: list[float], count: int) -> None:
    held = torch.tensor(values).bfloat16()
    stored = torch.zeros_like(held)
    write_moment(stored, held.float(), count=count)
    assert torch.equal(stored, held)


def test_a_moment_in_fp32_is_worked_on_in_place() -> None:
    moment = torch.ones(3)
    values = read_moment(moment)
    values += 1
    write_moment(moment, values, count=5)
    assert torch.equal(moment, torch.full((3,), 2.0))


@pytest.mark.parametrize("falls", [True, False])
def test_a_second_moment_with_coefficient_0999_follows_rising_and_falling_gradients(falls: bool) -> None:
    """Rounded to the nearest it stays where it is: 0.999 of a bf16 number rounds to the number itself."""
    square = torch.full((64,), 4.0 if falls else 0.25, dtype=torch.bfloat16)
    nearest, exact = square.clone(), square.double()
    target = 1.0
    for count in range(1, 2001):
        values = read_moment(square)
        values.mul_(0.999).add_(0.001 * target)
        write_moment(square, values, count=count)
        nearest.copy_(nearest.float() * 0.999 + 0.001 * target)
        exact = exact * 0.999 + 0.001 * target
    assert torch.allclose(square.double(), exact, rtol=0.02), (square[0], exact[0])
    if falls:
        assert not torch.allclose(nearest.double(), exact, rtol=0.02), "this test shows nothing"


@pytest.mark.parametrize("optimizer", ["adam", "lion"])
def test_bf16_moments_cost_half_the_bytes_and_change_the_updates_little(optimizer: str) -> None:
    wide = OptimConfig(lr=1e-3, optimizer=optimizer)
    half = OptimConfig(lr=1e-3, optimizer=optimizer, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")
    parts = [nn.Parameter(random(100_000, seed=1)) for _ in range(2)]
    optimizers = [build_optimizer(one, [(part, True)]) for one, part in zip((wide, half), parts, strict=True)]
    assert state_bytes(optimizers[1]) * 2 == state_bytes(optimizers[0]) == 100_000 * (8 if optimizer == "adam" else 4)
    for step in range(20):
        for one, part in zip(optimizers, parts, strict=True):
            part.grad = random(100_000, seed=100 + step)
            set_rates(one, lr=1e-2, weight_decay=0.1)
            one.step()
    ends = [part.detach() for part in parts]
    moved = (ends[0] - random(100_000, seed=1)).norm()
    # bf16 is good to 2^-8 in each moment; of Lion's signs a few hundredths are decided by less than that.
    assert 0 < float((ends[1] - ends[0]).norm() / moved) < (0.02 if optimizer == "adam" else 0.25)


def test_where_a_flat_parameter_is_cut_changes_no_bit_of_bf16_moments() -> None:
    config = OptimConfig(lr=1e-3, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")
    whole, cut = random(70_001, seed=3), random(70_001, seed=3)
    flat_parameters = [[nn.Parameter(whole)], [nn.Parameter(cut[:333]), nn.Parameter(cut[333:])]]
    optimizers = [build_optimizer(config, [(one, True) for one in parts]) for parts in flat_parameters]
    for step in range(3):
        grad = random(70_001, seed=10 + step)
        flat_parameters[0][0].grad, flat_parameters[1][0].grad, flat_parameters[1][1].grad = (
            grad,
            grad[:333].clone(),
            grad[333:].clone(),
        )
        for optimizer in optimizers:
            set_rates(optimizer, lr=0.1, weight_decay=0.1)
            optimizer.step()
    assert torch.equal(torch.cat([one.detach() for one in flat_parameters[1]]), flat_parameters[0][0].detach())
