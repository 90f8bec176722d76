"""Dropout whose mask is a pure function of the seed of the forward, the place in the model and the rank's shard.

No generator state lives across calls: a recomputed forward draws the same mask, and a resumed run needs no state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron3d.params.streams import stream_seed


def dropout(x: Tensor, probability: float, *, seed: int | None, place: str, shard: int = 0) -> Tensor:
    """Zero each element with `probability` and scale the rest by 1 / (1 - probability).

    Args:
        x: any shape.
        seed: seed of this forward, or None for no dropout.
        place: name of the place in the model.
        shard: number of the rank's shard where `x` varies over an axis, so that shards get different masks; 0 where
            `x` is the same on all ranks, so that they get the same one.
    """
    if seed is None or probability == 0.0:
        return x
    generator = torch.Generator(x.device).manual_seed(stream_seed(seed, place, shard))
    keep = torch.empty_like(x, memory_format=torch.contiguous_format)
    keep.bernoulli_(1.0 - probability, generator=generator)
    return (x * keep).mul(1.0 / (1.0 - probability))  # the scale as a number: bf16 would round it in the mask
