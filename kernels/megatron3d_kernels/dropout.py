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

No mask is kept where it can be made again without loss of time: the Triton kernel makes its bits in registers, forward
and in the backward, and so does the reference of large fp32 tensors, by chunks.

Shapes: W width of a row. Keys are int64 that hold the 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron3d_kernels.launch import as_rows, block_of, jit, launch, num_warps_for, tl
from megatron3d_kernels.selection import DEFAULT_SELECTION, Kernel, Selection

_STEPS = 1 << 16  # values of the 16 random bits that decide about one element
_LANES = 4  # elements that share one output of the generator
_LANE_BITS = 16
_CHUNK_WORDS = 1 << 16  # outputs computed at a time on a CPU: half a MiB, which stays in its cache
_CHUNK_WORDS_CUDA = 1 << 22
_BLOCK = 4096  # columns of one program of the Triton kernel
_KEYS_BLOCK = 512
# On a CPU the backward recomputes the mask only for elements of at least 4 bytes, in tensors of at least 2^18 elements;
# for others recomputing takes longer than storing the mask.
_WIDE_BYTES = 4
_LARGE = 1 << 18


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
    least = least_kept(probability)
    for chunk_keys, chunk_keep in zip(keys.reshape(-1, 1).split(rows), keep.split(rows), strict=True):
        count = len(chunk_keys)
        torch.add(chunk_keys, counters, out=z[:count])
        bits = _mix_(z[:count], scratch[:count]).view(torch.int16)
        torch.ge(bits[:, lanes_before : lanes_before + width], least, out=chunk_keep)
    return keep.view(*keys.shape, width)


def kept_scale(probability: float) -> float:
    """What kept elements are multiplied by so that the mean stays."""
    return _STEPS / (_STEPS - _num_dropped(probability))


def row_keys(
    x: Tensor, key: int, first_sample: int, positions_SB: Tensor, *, selection: Selection = DEFAULT_SELECTION
) -> Tensor:
    """The keys of the rows of x [S, B, W], int64 [S, B]: of the key, the sample and the position, in this order.

    Args:
        x: decides where and how its dropout is computed.
        key: from -2^63 to 2^63 - 1.
        first_sample: number of the first sample, which the others follow.
        positions_SB: int64 [S, B], or [S, 1] for all samples alike.
    """
    return selection.pick(DROPOUT, x).row_keys(key, range(first_sample, first_sample + x.shape[1]), positions_SB)


def least_kept(probability: float) -> int:
    """The least that the 16 bits of a kept element are, read as a signed number."""
    return _num_dropped(probability) - _STEPS // 2


@dataclass(frozen=True)
class RowDropout:
    """Which elements of [..., W] are dropped.

    Attributes:
        keys: int64 [...], the key of each row.
        probability: 0 to below 1, rounded to a multiple of 2^-16; the scale of what is kept is that of the rounded one.
    """

    keys: Tensor
    probability: float


def dropout(
    x: Tensor,
    keys: Tensor,
    probability: float,
    *,
    residual: Tensor | None = None,
    selection: Selection = DEFAULT_SELECTION,
) -> Tensor:
    """Zero each element of x [..., W] with `probability` and scale the rest so that the mean stays.

    Args:
        x: any floating dtype and any strides.
        keys: int64 [...], the key of each row.
        probability: as in `RowDropout`.
        residual: of the shape and dtype of x, added to the result.
    """
    assert keys.shape == x.shape[:-1], f"keys {tuple(keys.shape)} do not fit the rows of {tuple(x.shape)}"
    return selection.pick(DROPOUT, x).drop(x, RowDropout(keys, probability), residual)


def _reference(x: Tensor, dropping: RowDropout, residual: Tensor | None) -> Tensor:
    """By chunks where that costs no time, which is measured: less for large fp32 tensors (14 ms for 23 of [4096, 1024],
    both ways), more for small and narrow ones, of which the mask is kept, one byte an element. A compiler may make it
    again."""
    if torch.compiler.is_compiling():
        dropped = x * _keep_formula(dropping, x.shape[-1]) * kept_scale(dropping.probability)
        return dropped if residual is None else residual + dropped
    if x.device.type in ("cpu", "meta") and x.element_size() >= _WIDE_BYTES and x.numel() >= _LARGE:
        return _DropoutFromKeys.apply(x, residual, dropping, _dropped_by_chunks)
    keep = keep_mask(dropping.keys, x.shape[-1], dropping.probability)
    # The scale as a number: bf16 would round it in the mask.
    dropped = (x * keep).mul_(kept_scale(dropping.probability))
    return dropped if residual is None else residual + dropped


Drop = Callable[[Tensor, Tensor | None, RowDropout], Tensor]
"""(x, residual, dropping) -> x with elements dropped and the others scaled, plus the residual where there is one."""


class _DropoutFromKeys(torch.autograd.Function):
    """Keeps only the keys of the rows; `drop` makes the mask again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, dropping: RowDropout, drop: Drop) -> Tensor:
        """Drop, scale and add."""
        ctx.save_for_backward(dropping.keys)
        ctx.probability, ctx.drop = dropping.probability, drop
        return drop(x, residual, dropping)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The same of the gradient."""
        dropping = RowDropout(ctx.saved_tensors[0], ctx.probability)
        grad_x = ctx.drop(grad, None, dropping) if ctx.needs_input_grad[0] else None
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None


def _dropped_by_chunks(x: Tensor, residual: Tensor | None, dropping: RowDropout) -> Tensor:
    """On a CPU: a chunk's mask is made and used while it is in the cache."""
    rows, y = as_rows(x), x.new_empty(x.shape)
    y_rows, keys, width = y.view(rows.shape), dropping.keys.reshape(-1, 1), rows.shape[1]
    residual_rows = None if residual is None else as_rows(residual)
    counters = torch.arange(1, -(-width // _LANES) + 1, device=x.device) * _GAMMA
    count = min(len(rows), max(1, _CHUNK_WORDS // 2 // len(counters)))
    z, scratch = (torch.empty(count, len(counters), dtype=torch.int64, device=x.device) for _ in range(2))
    keep = torch.empty(count, width, dtype=torch.bool, device=x.device)
    least, scale = least_kept(dropping.probability), kept_scale(dropping.probability)
    # A tensor without memory shows with one chunk what all take.
    for first in range(0, len(rows) if x.device.type != "meta" else 1, count):
        some = slice(first, min(first + count, len(rows)))
        size = some.stop - first
        torch.add(keys[some], counters, out=z[:size])
        bits = _mix_(z[:size], scratch[:size]).view(torch.int16)
        torch.ge(bits[:, :width], least, out=keep[:size])
        torch.mul(rows[some], scale, out=y_rows[some]).mul_(keep[:size])
        if residual_rows is not None:
            y_rows[some].add_(residual_rows[some])
    return y


def _reference_keys(key: int, samples: range, positions_SB: Tensor) -> Tensor:
    samples_B = torch.arange(samples.start, samples.stop, device=positions_SB.device)
    return child_keys(child_keys(key, samples_B), positions_SB)


def _triton(x: Tensor, dropping: RowDropout, residual: Tensor | None) -> Tensor:
    """The Triton kernel behind one autograd function."""
    return _DropoutFromKeys.apply(x, residual, dropping, _dropped)


def _dropped(x: Tensor, residual: Tensor | None, dropping: RowDropout) -> Tensor:
    """By the Triton kernel: a program for each row and block of columns."""
    rows, y = as_rows(x), x.new_empty(x.shape)
    residual_rows = rows if residual is None else as_rows(residual)
    num_rows, num_columns = rows.shape
    block = max(block_of(num_columns, limit=_BLOCK), _LANES)
    grid = (num_rows, -(-num_columns // block))
    numbers = (least_kept(dropping.probability), kept_scale(dropping.probability))
    arguments = (rows, residual_rows, dropping.keys.contiguous(), y, rows.stride(0), residual_rows.stride(0))
    constants = {"HAS_RESIDUAL": residual is not None, "BLOCK": block, "num_warps": num_warps_for(block)}
    launch(_dropout_kernel, grid, *arguments, num_columns, *numbers, device=x.device, **constants)
    return y


def _triton_keys(key: int, samples: range, positions_SB: Tensor) -> Tensor:
    """One launch, where the composition takes about twenty."""
    count, positions = len(samples), positions_SB.contiguous()
    keys_SB = torch.empty(len(positions), count, dtype=torch.int64, device=positions.device)
    sizes = (keys_SB.numel(), key, samples.start, count)
    grid, constants = (-(-keys_SB.numel() // _KEYS_BLOCK),), {"BLOCK": _KEYS_BLOCK, "num_warps": 4}
    constants = {"OF_EACH_SAMPLE": positions.shape[1] > 1, **constants}
    launch(_row_keys_kernel, grid, positions, keys_SB, *sizes, device=positions.device, **constants)
    return keys_SB


@jit
def _output(keys: tl.tensor, numbers: tl.tensor) -> tl.tensor:
    """Outputs of SplitMix64, uint64."""
    z = keys + (numbers + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@jit
def _row_keys_kernel(
    positions_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    num_rows: tl.tensor,
    key: tl.tensor,
    first_sample: tl.tensor,
    num_samples: tl.tensor,
    OF_EACH_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The keys of BLOCK rows, each of its sample and its position."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    at = rows if OF_EACH_SAMPLE else rows // num_samples
    positions = tl.load(positions_ptr + at, mask=inside, other=0)
    keys = tl.zeros((BLOCK,), dtype=tl.int64) + key
    of_samples = _output(keys.to(tl.uint64), first_sample + rows % num_samples)
    tl.store(keys_ptr + rows, _output(of_samples, positions).to(tl.int64), mask=inside)


@jit
def kept_columns(key: tl.tensor, first_word: tl.tensor, least: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Which of BLOCK (at least 4) elements of a row are kept, from output `first_word` of its key on."""
    z = _output(key.to(tl.uint64), first_word + tl.arange(0, BLOCK // 4))
    shifts = (tl.arange(0, 4) * 16).to(tl.uint64)
    lanes = (z[:, None] >> shifts[None, :]).to(tl.uint16).to(tl.int16, bitcast=True)
    return tl.reshape(lanes, (BLOCK,)).to(tl.int32) >= least


@jit
def _dropout_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    y_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    num_columns: tl.tensor,
    least: tl.tensor,
    scale: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Drop and scale BLOCK elements of one row, and add the residual."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    keep = kept_columns(tl.load(keys_ptr + row), block * (BLOCK // 4), least, BLOCK)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(keep, x * scale, 0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * num_columns + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


def _keep_formula(dropping: RowDropout, width: int) -> Tensor:
    """`keep_mask` element by element, for a compiler that fuses it with what uses it."""
    elements = torch.arange(width, device=dropping.keys.device)
    z = dropping.keys.unsqueeze(-1) + (elements // _LANES + 1) * _GAMMA
    for shift, factor in _ROUNDS:
        z = z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))
        z = z if factor is None else z * factor
    bits = (z >> (elements % _LANES * _LANE_BITS)) & (_STEPS - 1)
    signed = (bits ^ (_STEPS // 2)) - _STEPS // 2
    return signed >= least_kept(dropping.probability)


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


@dataclass(frozen=True)
class Implementation:
    """Dropout of x by keys, with a residual added or None, and the keys of the rows of a hidden tensor."""

    drop: Callable[[Tensor, RowDropout, Tensor | None], Tensor]
    row_keys: Callable[[int, range, Tensor], Tensor]


DROPOUT = Kernel(
    name="dropout",
    reference=Implementation(_reference, _reference_keys),
    triton=Implementation(_triton, _triton_keys),
)
