"""Normal numbers by index: any box of a tensor's numbers, without those outside of it.

Four neighbours in a row come from 64 bits that are a hash of the seed and of their place, SplitMix64:

    bits = mix(seed + gamma * place),    place = row * ceil(C / 4) + column // 4

Each half of the bits gives two neighbours by Box and Muller: 16 bits choose a radius, 16 an angle.

    x, y = r cos(t), r sin(t),    r^2 = -2 ln(u)

Radii and angles are looked up in tables of 2^16 rather than computed: that is faster, and gives the same bits on every
processor. A radius stands for a range of u, of which it has the mean of r^2, so that the variance is exactly 1. The
largest number is 4.9.

Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64); Box and Muller 1958.
"""

from __future__ import annotations

import sys
from functools import cache
from math import ceil, pi, prod

import numpy as np
import torch
from torch import Tensor

from megatron3d.params.boxes import Box

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_STEPS = 1 << 16  # of radii, and of angles
_LANES = 4  # numbers from 64 bits
_BLOCK = 1 << 15  # words of 64 bits drawn at once: what they become and the tables stay in the cache


def fill_normal(out: Tensor, box: Box, shape: tuple[int, ...], *, std: float, seed: int) -> None:
    """Write the numbers of a box of a tensor into `out`, with mean 0 and standard deviation `std`.

    Args:
        out: fp32 on the CPU, contiguous, of the size of the box.
        box: of the tensor, with at least one element.
        shape: of the tensor, of at least one dimension.
        std: of the numbers.
        seed: of the tensor, 64 bits.
    """
    first, last = box.offset[-1], box.offset[-1] + box.size[-1]
    row_starts = _rows_of(box, shape) * np.uint64(ceil(shape[-1] / _LANES) * _GAMMA % 2**64) + np.uint64(seed)
    words = range(first // _LANES, ceil(last / _LANES))
    rows_at_once, out_RC, radii = max(1, _BLOCK // len(words)), out.view(len(row_starts), -1), _radii(std)
    for word in words[::_BLOCK]:
        steps = np.arange(word, min(word + _BLOCK, words.stop), dtype=np.uint64) * np.uint64(_GAMMA)
        from_column = word * _LANES
        low, high = max(first, from_column), min(last, from_column + len(steps) * _LANES)
        for row in range(0, len(row_starts), rows_at_once):
            counters_RW = row_starts[row : row + rows_at_once, None] + steps
            radius_RC, direction_RC = _looked_up(counters_RW, radii)
            wanted = (slice(None), slice(low - from_column, high - from_column))
            out_part = out_RC[row : row + rows_at_once, low - first : high - first]
            torch.mul(radius_RC[wanted], direction_RC[wanted], out=out_part)


def _rows_of(box: Box, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of the rows of a box, where all dimensions but the last are counted through."""
    rows = np.zeros(1, dtype=np.uint64)
    for dim in range(len(shape) - 1):
        here = np.arange(box.offset[dim], box.offset[dim] + box.size[dim], dtype=np.uint64)
        rows = (rows[:, None] + here * np.uint64(prod(shape[dim + 1 : -1]))).ravel()
    return rows


def _looked_up(counters_RW: np.ndarray, radii: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of four numbers for each counter, fp32 [R, 4 W]; overwrites the counters."""
    bits = _mixed(counters_RW.reshape(-1)).view(np.uint32)
    if sys.byteorder == "big":
        bits = bits.reshape(-1, 2)[:, ::-1].ravel()
    angles = torch.from_numpy((bits >> np.uint32(16)).view(np.int32))
    bits &= np.uint32(_STEPS - 1)
    numbers = torch.from_numpy(bits.view(np.int32))
    pairs = radii.index_select(0, numbers), _directions().index_select(0, angles)
    radius_RC, direction_RC = (one.view(torch.float32).view(len(counters_RW), -1) for one in pairs)
    return radius_RC, direction_RC


def _mixed(words: np.ndarray) -> np.ndarray:
    """The hash of 64-bit words, in their place."""
    shifted = words >> _SHIFTS[0]
    words ^= shifted
    words *= _MULTIPLIERS[0]
    words ^= np.right_shift(words, _SHIFTS[1], out=shifted)
    words *= _MULTIPLIERS[1]
    words ^= np.right_shift(words, _SHIFTS[2], out=shifted)
    return words


def _radii(std: float) -> Tensor:
    """Every radius times `std`, twice: pairs of fp32 as one fp64, which a lookup takes as one."""
    return (_unit_radii() * std).repeat_interleave(2).view(torch.float64)


@cache
def _unit_radii() -> Tensor:
    u = np.arange(_STEPS + 1, dtype=np.float64) / _STEPS
    integral = u * np.log(np.where(u > 0, u, 1.0)) - u  # of the logarithm, from 0
    return torch.from_numpy(np.sqrt(-2.0 * _STEPS * np.diff(integral)).astype(np.float32))


@cache
def _directions() -> Tensor:
    """Cosine and sine of every angle: pairs of fp32 as one fp64."""
    angle = (np.arange(_STEPS, dtype=np.float64) + 0.5) * (2.0 * pi / _STEPS)
    return torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32).ravel()).view(
        torch.float64
    )
