"""The key-value cache: what attention keeps of the tokens that were read, so that each is read once.

Dims: B sequences, G key and value heads of this rank, T positions, S new positions, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class StageCache:
    """Keys and values of the layers of one stage, in memory that is allocated once for the longest sequence."""

    def __init__(
        self, layers: Iterable[int], shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate for every layer two tensors of `shape`, [B, G, T, D], of which nothing is filled yet."""
        self._layers = {
            layer: (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for layer in layers
        }
        self._filled = dict.fromkeys(self._layers, 0)
        self.capacity = shape[2]

    def extend(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values [B, G, S, D] of new positions behind those there; returns all filled so far.

        What it returns are views of the cache, good until the next call.

        Raises:
            ValueError: there is no room for that many positions.
        """
        keys, values = self._layers[layer]
        start = self._filled[layer]
        stop = start + k_BGTD.shape[2]
        if stop > self.capacity:
            raise ValueError(f"layer {layer}: {stop} positions for a cache of {self.capacity}")
        keys[:, :, start:stop].copy_(k_BGTD)
        values[:, :, start:stop].copy_(v_BGTD)
        self._filled[layer] = stop
        return keys[:, :, :stop], values[:, :, :stop]
