"""Sums of squares that are made block by block."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron3d.params import norms

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # which way to go; the tensors are on the CPU in either case
BLOCK = 2 * norms.NORM_CHUNK


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + norms.NORM_CHUNK + 5])
def test_a_sum_of_squares_has_each_element_once_however_long_the_blocks_are(length: int) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(length))
    with mock.patch.object(norms, "_AT_ONCE", BLOCK):
        total = norms.squared_norm(values)
    torch.testing.assert_close(total, values.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_several_tensors_have_the_sum_of_their_squares(device: torch.device) -> None:
    tensors = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (5, 0, 9001, 1)]
    expected = sum(one.double().square().sum() for one in tensors)
    total = norms.sum_of_squares(tensors, device)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    assert float(norms.sum_of_squares([], CPU)) == 0.0


def test_a_gpu_takes_one_norm_of_each_tensor_however_long_it_is() -> None:
    """A billion elements, which on the CPU are 61 times 2^24 in chunks of 4,096."""
    tensors = [torch.empty(size, device="meta") for size in (10**9, 7)]
    with LaunchCounter() as seen:
        norms.sum_of_squares(tensors, torch.device("meta"))
    assert seen.launches <= len(tensors) + 5, "a norm each, then stacked, squared and widened"


class LaunchCounter(TorchDispatchMode):
    """How many operations run that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.launches += not func.is_view
        return func(*args, **(kwargs or {}))
