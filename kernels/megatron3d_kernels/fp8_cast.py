"""Casts to fp8: the largest magnitude of a tensor, and matrices in the two orientations that products need.

A linear layer's products sum over its inputs, its outputs and its tokens in turn, and a GPU multiplies fp8 only where
both operands have the summed dimension last in memory. So a cast gives a matrix as it lies ("rows"), transposed
("columns"), or both from one reading of it. The references give views where a GPU needs copies.

Casts by one scale take the largest magnitude as an argument, so that ranks which hold parts of a tensor can agree on
it in between. All of it is exact integer arithmetic on bits but for one rounding, so the two implementations agree to
the bit.

Shapes: R rows, C columns of the matrix that is cast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron3d_kernels.fp8 import (
    BLOCK,
    EXPONENT_OF_MAX,
    Operand,
    Scaling,
    bits_of,
    inverse_of,
    padded,
    scale_of,
)
from megatron3d_kernels.launch import as_rows, jit, launch, tl
from megatron3d_kernels.selection import DEFAULT_SELECTION, Kernel, Selection

Pair = tuple[Operand | None, Operand | None]

_AMAX_BLOCK, _AMAX_PROGRAMS = 4096, 1024
_TILE = 64
_SUMMED_MULTIPLE = 16
"""What a GPU's products need the summed dimension to be a multiple of; the tokens of a batch are padded with zeros."""


@dataclass(frozen=True)
class Orientations:
    """What a cast is to give: the matrix [R, C] summed over C, and its transpose [C, R] summed over R."""

    rows: bool = True
    columns: bool = True


@dataclass(frozen=True)
class Fp8Cast:
    """One implementation; see the functions below."""

    amax: Callable[[Tensor], Tensor]
    tensor: Callable[[Tensor, Tensor, torch.dtype, Orientations], Pair]
    blocks: Callable[[Tensor, torch.dtype, Orientations, bool], Pair]
    transpose: Callable[[Operand], Operand]


def amax_bits(x: Tensor, *, selection: Selection = DEFAULT_SELECTION) -> Tensor:
    """The largest magnitude in a tensor as the bits of an fp32 number, int32 [1]. Their order is that of the numbers,
    and infinity and NaN are above all, so a maximum over ranks keeps them."""
    return selection.pick(FP8_CAST, x).amax(x)


def cast_tensor(
    x_RC: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
    wanted: Orientations = Orientations(),
    *,
    selection: Selection = DEFAULT_SELECTION,
) -> Pair:
    """The matrix by one scale, that of `amax` (`amax_bits`), in the orientations that are wanted."""
    return selection.pick(FP8_CAST, x_RC).tensor(x_RC, amax, dtype, wanted)


def cast_blocks(
    x_RC: Tensor,
    dtype: torch.dtype,
    wanted: Orientations = Orientations(),
    *,
    square: bool,
    selection: Selection = DEFAULT_SELECTION,
) -> Pair:
    """The matrix by a scale for each `square` of 128 x 128, else for each 128 elements along the summed dimension,
    which for rows and columns are other blocks."""
    return selection.pick(FP8_CAST, x_RC).blocks(x_RC, dtype, wanted, square)


def transpose(operand: Operand, *, selection: Selection = DEFAULT_SELECTION) -> Operand:
    """An operand of one scale, to be summed over its rows."""
    return selection.pick(FP8_CAST, operand.scale).transpose(operand)


def _reference_amax(x: Tensor) -> Tensor:
    smallest, largest = torch.aminmax(x)
    return bits_of(torch.maximum(-smallest, largest)).reshape(1)


def _reference_tensor(x_RC: Tensor, amax: Tensor, dtype: torch.dtype, wanted: Orientations) -> Pair:
    scale = scale_of(amax, dtype)
    rows = Operand(_divided(x_RC, scale).to(dtype), scale, "tensor")
    return rows if wanted.rows else None, rows.transposed() if wanted.columns else None


def _reference_blocks(x_RC: Tensor, dtype: torch.dtype, wanted: Orientations, square: bool) -> Pair:
    if square:
        rows = _quantized(x_RC, dtype, BLOCK, "squares")
        return rows if wanted.rows else None, rows.transposed() if wanted.columns else None
    return (
        _quantized(x_RC, dtype, 1, "rows") if wanted.rows else None,
        _quantized(x_RC.t(), dtype, 1, "rows") if wanted.columns else None,
    )


def _quantized(x_RC: Tensor, dtype: torch.dtype, height: int, scaling: Scaling) -> Operand:
    """By blocks of `height` x 128; those at the edges are smaller."""
    rows, columns = x_RC.shape
    blocks = padded(x_RC, height, BLOCK).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height))  # [r, height, c, 128]
    scale_rc = scale_of(bits_of(blocks.abs().amax((1, 3))), dtype)
    data = _divided(blocks, scale_rc[:, None, :, None]).to(dtype)
    return Operand(data.flatten(2).flatten(0, 1)[:rows, :columns], scale_rc, scaling)


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in the dtype of x, where this has the range of fp32, so that it is exact."""
    wide = x.float() if x.dtype == torch.float16 else x
    return wide * inverse_of(scale).to(wide.dtype)


def _triton_amax(x: Tensor) -> Tensor:
    x, largest = x.contiguous(), torch.zeros(1, dtype=torch.int32, device=x.device)
    programs = min(_AMAX_PROGRAMS, -(-x.numel() // _AMAX_BLOCK))
    constants = {"BLOCK": _AMAX_BLOCK, "num_warps": 8}
    launch(_amax_kernel, (programs,), x, largest, x.numel(), programs, device=x.device, **constants)
    return largest


def _triton_tensor(x_RC: Tensor, amax: Tensor, dtype: torch.dtype, wanted: Orientations) -> Pair:
    x_RC = as_rows(x_RC)
    (R, C), scale = x_RC.shape, torch.empty(1, dtype=torch.float32, device=x_RC.device)
    depth = R + -R % _SUMMED_MULTIPLE
    rows = x_RC.new_empty((R, C), dtype=dtype) if wanted.rows else None
    columns = x_RC.new_empty((C, depth), dtype=dtype) if wanted.columns else None
    arguments = (x_RC, amax, _filler(rows, scale), _filler(columns, scale), scale, R, C, x_RC.stride(0), depth)
    constants = {"MAX_EXPONENT": EXPONENT_OF_MAX[dtype], **_wanted(wanted), "TILE": _TILE, "num_warps": 4}
    launch(_tensor_kernel, (-(-depth // _TILE), -(-C // _TILE)), *arguments, device=x_RC.device, **constants)
    return _operand(rows, scale, "tensor"), _operand(columns, scale, "tensor")


def _triton_blocks(x_RC: Tensor, dtype: torch.dtype, wanted: Orientations, square: bool) -> Pair:
    x_RC = as_rows(x_RC)
    R, C = x_RC.shape
    high, wide = -(-R // BLOCK), -(-C // BLOCK)
    rows = x_RC.new_empty((R, C), dtype=dtype) if wanted.rows else None
    columns = x_RC.new_empty((C, high * BLOCK), dtype=dtype) if wanted.columns else None
    # A GPU's products want the scales of neighbouring rows next to each other.
    row_scale = x_RC.new_empty((high, wide) if square else (wide, R), dtype=torch.float32)
    column_scale = row_scale if square else x_RC.new_empty((high, C), dtype=torch.float32)
    arguments = (x_RC, _filler(rows, row_scale), _filler(columns, row_scale), row_scale, column_scale)
    sizes = (R, C, x_RC.stride(0), high * BLOCK, wide)
    constants = {"MAX_EXPONENT": EXPONENT_OF_MAX[dtype], "SQUARE": square, **_wanted(wanted), "num_warps": 16}
    launch(_blocks_kernel, (high, wide), *arguments, *sizes, device=x_RC.device, **constants)
    if square:
        return _operand(rows, row_scale, "squares"), _operand(columns, row_scale.t(), "squares")
    return _operand(rows, row_scale.t(), "rows"), _operand(columns, column_scale.t(), "rows")


def _triton_transpose(operand: Operand) -> Operand:
    """One copy, of bytes; rows of zeros are added where the summed dimension needs them."""
    bytes_CR = padded(operand.data_RK.view(torch.uint8), _SUMMED_MULTIPLE, 1).t().contiguous()
    return Operand(bytes_CR.view(operand.data_RK.dtype), operand.scale, operand.scaling)


def _operand(data: Tensor | None, scale: Tensor, scaling: Scaling) -> Operand | None:
    return None if data is None else Operand(data, scale, scaling)


def _filler(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Something to pass for an output that a kernel does not write."""
    return other if tensor is None else tensor


def _wanted(wanted: Orientations) -> dict[str, bool]:
    return {"HAS_ROWS": wanted.rows, "HAS_COLUMNS": wanted.columns}


@jit
def _scale_bits(amax_bits: tl.tensor, MAX_EXPONENT: tl.constexpr) -> tl.tensor:
    """`fp8.scale_of`, as bits."""
    bits = ((amax_bits + 0x1FFFFF) & 0x7F800000) - MAX_EXPONENT * 8388608
    bits = tl.maximum(bits, 226492416)  # SMALLEST_SCALE_BITS
    return tl.where(amax_bits < 0x7F800000, bits, 0x7FC00000)


@jit
def _inverse(scale_bits: tl.tensor) -> tl.tensor:
    """`fp8.inverse_of`."""
    bits = tl.where(scale_bits == 0x7FC00000, scale_bits, 2130706432 - scale_bits)  # INVERSE_BITS
    return bits.to(tl.float32, bitcast=True)


@jit
def _rounded(x: tl.tensor, MAX_EXPONENT: tl.constexpr) -> tl.tensor:
    """Scaled fp32 numbers, rounded to nearest even numbers of E4M3 or E5M2, so that the conversion is exact: adding a
    power of two to a magnitude cuts the bits that are too many. Triton's interpreter converts others wrongly."""
    mantissa = 3 if MAX_EXPONENT == 8 else 2
    smallest = 127 - 6 if MAX_EXPONENT == 8 else 127 - 14  # exponents below are those of subnormals
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits & 0x7F800000) >> 23, smallest)
    cutter = ((exponent + (23 - mantissa)) << 23).to(tl.float32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    rounded = (magnitude + cutter) - cutter
    return tl.where(bits < 0, -rounded, rounded)


@jit
def _amax_kernel(
    x_ptr: tl.tensor, largest_ptr: tl.tensor, num_elements: tl.tensor, num_programs: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Blocks program, program + num_programs, ... of the tensor; magnitudes are compared as integers."""
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(num_elements, BLOCK), num_programs):
        offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < num_elements, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(largest_ptr, tl.max(largest, axis=0))


@jit
def _tensor_kernel(
    x_ptr: tl.tensor,
    amax_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    x_stride: tl.tensor,
    depth: tl.tensor,
    MAX_EXPONENT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One tile by the scale of the whole; rows past the last are zeros in the columns, up to `depth`."""
    scale_bits = _scale_bits(tl.load(amax_ptr), MAX_EXPONENT)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_ptr, scale_bits.to(tl.float32, bitcast=True))
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scaled = _rounded(x * _inverse(scale_bits), MAX_EXPONENT)
    if HAS_ROWS:
        where = rows_ptr + rows[:, None] * num_columns + columns[None, :]
        tl.store(where, scaled, mask=inside)
    if HAS_COLUMNS:
        where = columns_ptr + columns[:, None] * depth + rows[None, :]
        inside = (columns < num_columns)[:, None] & (rows < depth)[None, :]
        tl.store(where, tl.trans(scaled), mask=inside)


@jit
def _blocks_kernel(
    x_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    column_scale_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    x_stride: tl.tensor,
    depth: tl.tensor,
    num_wide: tl.tensor,
    MAX_EXPONENT: tl.constexpr,
    SQUARE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
) -> None:
    """One square of 128 x 128, by one scale or by those of its rows and of its columns."""
    high, wide = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, columns = high * 128 + tl.arange(0, 128), wide * 128 + tl.arange(0, 128)
    in_rows, in_columns = rows < num_rows, columns < num_columns
    inside = in_rows[:, None] & in_columns[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    along_rows = tl.max(magnitude, axis=1)
    along_columns = tl.max(magnitude, axis=0)
    if SQUARE:
        largest = tl.max(along_rows, axis=0)
        along_rows = tl.zeros((128,), dtype=tl.int32) + largest
        along_columns = tl.zeros((128,), dtype=tl.int32) + largest
        bits = _scale_bits(largest, MAX_EXPONENT)
        tl.store(row_scale_ptr + high * num_wide + wide, bits.to(tl.float32, bitcast=True))
    if HAS_ROWS:
        bits = _scale_bits(along_rows, MAX_EXPONENT)
        if not SQUARE:
            tl.store(row_scale_ptr + wide * num_rows + rows, bits.to(tl.float32, bitcast=True), mask=in_rows)
        scaled = _rounded(x * _inverse(bits)[:, None], MAX_EXPONENT)
        where = rows_ptr + rows[:, None] * num_columns + columns[None, :]
        tl.store(where, scaled, mask=inside)
    if HAS_COLUMNS:
        bits = _scale_bits(along_columns, MAX_EXPONENT)
        if not SQUARE:
            tl.store(
                column_scale_ptr + high * num_columns + columns, bits.to(tl.float32, bitcast=True), mask=in_columns
            )
        scaled = tl.trans(_rounded(x * _inverse(bits)[None, :], MAX_EXPONENT))
        where = columns_ptr + columns[:, None] * depth + rows[None, :]
        tl.store(where, scaled, mask=in_columns[:, None])


FP8_CAST = Kernel(
    name="fp8_cast",
    reference=Fp8Cast(
        amax=_reference_amax, tensor=_reference_tensor, blocks=_reference_blocks, transpose=Operand.transposed
    ),
    triton=Fp8Cast(amax=_triton_amax, tensor=_triton_tensor, blocks=_triton_blocks, transpose=_triton_transpose),
)
