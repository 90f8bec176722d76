"""The clip factor against torch's own clipping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.optim.clip import clip_factor


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 7.0, 100.0])
def test_gradients_times_the_factor_are_what_torch_leaves(max_norm: float) -> None:
    grad = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    parameter.grad = grad.clone()
    norm = float(torch.nn.utils.clip_grad_norm_([parameter], max_norm))
    torch.testing.assert_close(grad * clip_factor(norm, max_norm), parameter.grad)


@given(st.floats(0, 1e12), st.floats(1e-6, 1e6))
def test_the_factor_never_enlarges_and_brings_the_norm_under_the_limit(norm: float, max_norm: float) -> None:
    factor = clip_factor(norm, max_norm)
    assert 0 < factor <= 1 and norm * factor <= max_norm * (1 + 1e-12)
    if norm < max_norm * 0.9 - 1e-5:
        assert factor == 1.0, "a norm under the limit is left alone"


@pytest.mark.parametrize("max_norm", [0.0, -1.0])
def test_a_limit_of_zero_clips_nothing(max_norm: float) -> None:
    assert clip_factor(1e30, max_norm) == 1.0


def test_an_infinite_norm_leaves_nothing_of_the_gradients() -> None:
    assert clip_factor(math.inf, 1.0) == 0.0
