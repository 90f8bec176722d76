"""The cache returns all that was written to it, layer by layer, and never moves."""

from __future__ import annotations

import pytest
import torch

from megatron3d.inference.kv_cache import StageCache


def test_positions_come_back_in_the_order_in_which_they_were_written() -> None:
    whole = torch.randn(2, 3, 6, 4)
    cache = StageCache([5, 9], (2, 3, 6, 4), dtype=torch.float32, device=torch.device("cpu"))
    addresses = set()
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        for layer in (5, 9):
            part = whole[:, :, start:stop] * layer
            keys, values = cache.extend(layer, part, -part)
            assert torch.equal(keys, whole[:, :, :stop] * layer) and torch.equal(values, -whole[:, :, :stop] * layer)
            addresses.add(keys.data_ptr())
    assert len(addresses) == 2, "memory was allocated again"


def test_more_positions_than_allocated_are_refused_with_the_numbers() -> None:
    cache = StageCache([0], (1, 1, 4, 2), dtype=torch.float32, device=torch.device("cpu"))
    part = torch.zeros(1, 1, 3, 2)
    cache.extend(0, part, part)
    with pytest.raises(ValueError, match="layer 0: 6 positions for a cache of 4"):
        cache.extend(0, part, part)
