"""Dropout whose mask is a pure function of the seed of the forward, the place in the model and the rank's shard.

No generator state lives across calls: a recomputed forward draws the same mask, and a resumed run needs no state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron3d.params.streams import stream_seed

_STEPS = 1 << 16  # values of the 16 random bits that decide about one element


def dropout(x: Tensor, probability: float, *, seed: int | None, place: str, shard: int = 0) -> Tensor:
    """Zero each element with `probability` and scale the rest so that the mean stays.

    Sixteen bits decide about an element, so the probability is rounded to a multiple of 2^-16, and the scale is that of
    the rounded one. Four elements share a draw of the generator: drawing is most of what dropout costs on a CPU.

    Args:
        x: any shape.
        probability: 0 to below 1.
        seed: seed of this forward, or None for no dropout.
        place: name of the place in the model.
        shard: number of the rank's shard where `x` varies over an axis, so that shards get different masks; 0 where
            `x` is the same on all ranks, so that they get the same one.
    """
    if seed is None or probability == 0.0:
        return x
    dropped = min(round(probability * _STEPS), _STEPS - 1)
    generator = torch.Generator(x.device).manual_seed(stream_seed(seed, place, shard))
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    words.random_(-(1 << 63), None, generator=generator)  # from the smallest on without an end: all 64 bits
    keep = (words.view(torch.int16)[: x.numel()] >= dropped - _STEPS // 2).view(x.shape)
    return (x * keep).mul(_STEPS / (_STEPS - dropped))  # the scale as a number: bf16 would round it in the mask
