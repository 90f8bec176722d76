"""Sums of squares that are made block by block."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron3d.params import norms

BLOCK = 2 * norms.NORM_CHUNK


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + norms.NORM_CHUNK + 5])
def test_a_sum_of_squares_has_each_element_once_however_long_the_blocks_are(length: int) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(length))
    with mock.patch.object(norms, "_AT_ONCE", BLOCK):
        total = norms.squared_norm(values)
    torch.testing.assert_close(total, values.double().square().sum(), rtol=1e-6, atol=0)
