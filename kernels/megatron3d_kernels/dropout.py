"""Dropout whose masks are a function of numbers and of nothing else: no generator, no state, on any device the same.

Random bits are those of SplitMix64. Its output number n (from 0) for a 64-bit key is

    mix(key + (n + 1) * 0x9E3779B97F4A7C15)                                  modulo 2^64, with
    mix(z):  z = (z xor z >> 30) * 0xBF58476D1CE4E5B9                        shifts fill with zeros
             z = (z xor z >> 27) * 0x94D049BB133111EB
             z xor z >> 31

A tensor [..., W] has one key for each of its rows. Element w of a row is decided by 16 bits: bits 16*(w mod 4) to
16*(w mod 4) + 15 of output number floor(w / 4) for the row's key. Read as a signed 16-bit number, they keep the element
where they are at least round(65536 * probability) - 32768. So a row's mask does not depend on the rows beside it or
on the row's length. The keys of rows are outputs themselves: `child_keys` takes one output of a key for each number of
a coordinate (a sample, a position), and so on for the next coordinate.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), figures 16 and 17, with the
mixer "Mix13" of Stafford, as in Java's SplittableRandom and Vigna's splitmix64.c.

Shapes: W width of a row. Keys are int64 that hold the 64 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEPS = 1 << 16  # values of the 16 random bits that decide about one element
_LANES = 4  # elements that share one output of the generator
_CHUNK_WORDS = 1 << 16  # outputs computed at a time on a CPU: half a MiB, which stays in its cache
_CHUNK_WORDS_CUDA = 1 << 22


def _signed(bits: int) -> int:
    """The int64 with these 64 bits."""
    return bits - (1 << 64) if bits >> 63 else bits


_GAMMA = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, None))


def child_keys(keys: Tensor | int, numbers: Tensor) -> Tensor:
    """Output number `numbers` of the generator of `keys`, int64, broadcast over both.

    Args:
        keys: int64 of any shape, or a number from -2^63 to 2^63 - 1.
        numbers: int64 of at least 0.
    """
    z = (numbers + 1) * _GAMMA + keys
    return _mix_(z, torch.empty_like(z))


def keep_mask(keys: Tensor, width: int, probability: float, *, first: int = 0) -> Tensor:
    """Which elements are kept: bool [..., W] for keys [...], each dropped with `probability`, 0 to below 1; those from
    element `first` of the rows on."""
    keep = torch.empty(keys.numel(), width, dtype=torch.bool, device=keys.device)
    if keep.numel() == 0:
        return keep.view(*keys.shape, width)
    first_word, lanes_before = divmod(first, _LANES)
    words = -(-(lanes_before + width) // _LANES)
    counters = torch.arange(first_word + 1, first_word + words + 1, device=keys.device) * _GAMMA
    most = _CHUNK_WORDS_CUDA if keys.is_cuda else _CHUNK_WORDS
    rows = min(keys.numel(), max(1, most // words))
    z, scratch = (torch.empty(rows, words, dtype=torch.int64, device=keys.device) for _ in range(2))
    least = _num_dropped(probability) - _STEPS // 2
    for chunk_keys, chunk_keep in zip(keys.reshape(-1, 1).split(rows), keep.split(rows), strict=True):
        count = len(chunk_keys)
        torch.add(chunk_keys, counters, out=z[:count])
        bits = _mix_(z[:count], scratch[:count]).view(torch.int16)
        torch.ge(bits[:, lanes_before : lanes_before + width], least, out=chunk_keep)
    return keep.view(*keys.shape, width)


def kept_scale(probability: float) -> float:
    """What kept elements are multiplied by so that the mean stays."""
    return _STEPS / (_STEPS - _num_dropped(probability))


def dropout(x: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Zero each element of x [..., W] with `probability` and scale the rest so that the mean stays.

    The probability is rounded to a multiple of 2^-16, and the scale is that of the rounded one. Kept for the backward
    is the mask, one byte an element.

    Args:
        x: any floating dtype and any strides.
        keys: int64 [...], the key of each row.
        probability: 0 to below 1.
    """
    assert keys.shape == x.shape[:-1], f"keys {tuple(keys.shape)} do not fit the rows of {tuple(x.shape)}"
    keep = keep_mask(keys, x.shape[-1], probability)
    return (x * keep).mul_(kept_scale(probability))  # the scale as a number: bf16 would round it in the mask


def _num_dropped(probability: float) -> int:
    assert 0.0 <= probability < 1.0 and not math.isnan(probability), f"dropout of {probability}"
    return min(round(probability * _STEPS), _STEPS - 1)


def _mix_(z: Tensor, scratch: Tensor) -> Tensor:
    """The mixer, in place; `scratch` has the shape of `z`. torch shifts int64 with its sign, so the bits that a shift
    fills are cleared."""
    for shift, factor in _ROUNDS:
        torch.bitwise_right_shift(z, shift, out=scratch)
        z.bitwise_xor_(scratch.bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            z.mul_(factor)
    return z
