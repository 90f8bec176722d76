"""Root-mean-square normalization over the last dimension, with the statistic in fp32.

    y = x / sqrt(mean(x^2) + eps) * weight

Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4, eps inside the root as in Llama.
With g = dy * weight and n = x / rms, the gradients are dx = (g - n * mean(g * n)) / rms and dweight = sum(dy * n) over
all rows. H is the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron3d_kernels.launch import (
    NORM_CHUNK_ELEMENTS,
    as_rows,
    compute_dtype,
    jit,
    launch,
    num_warps_for,
    row_chunks,
    tl,
    whole_row_block,
)
from megatron3d_kernels.selection import DEFAULT_SELECTION, Kernel, Selection

BACKWARD_PROGRAMS = 512
"""Programs of the backward kernel; each sums the weight gradient of its rows before one torch sum over programs.
A fixed number, not the device's, keeps the order of summation and so the result the same on every GPU."""


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, selection: Selection = DEFAULT_SELECTION
) -> torch.Tensor:
    """Divide x [..., H] by its root mean square per row and scale by weight [H].

    The arithmetic is fp32 (fp64 for fp64 inputs), and so is the product with the weight; the result has the dtype of x.
    """
    return selection.pick(RMS_NORM, x)(x, weight, eps)


def _reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own function on a GPU, which computes in fp32; a weight of another dtype is not rounded to x's.

    On a CPU torch composes it of whole tensors, and its backward of many more, so the rows are taken in chunks there,
    but in a graph that is traced for any number of rows.
    """
    if not x.is_cuda and not torch.compiler.is_compiling():
        return _RMSNormByChunks.apply(x, weight, eps)
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    dtype = compute_dtype(x.dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


class _RMSNormByChunks(torch.autograd.Function):
    """Saves what `_RMSNorm` does; only a chunk of rows is ever held in the dtype of the arithmetic."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Some rows at a time."""
        rows, dtype = as_rows(x), compute_dtype(x.dtype)
        scale = weight.to(dtype)
        y = x.new_empty(rows.shape)
        inverse_rms = x.new_empty(len(rows), 1, dtype=dtype)
        for some in row_chunks(rows, NORM_CHUNK_ELEMENTS):
            wide = rows[some].to(dtype)
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            inverse_rms[some] = norm.square_().div_(rows.shape[1]).add_(eps).rsqrt_()
            y[some] = (wide * inverse_rms[some]).mul_(scale)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Both gradients of the same rows at a time; the weight's is added up in the dtype of the arithmetic."""
        x, weight, inverse_rms = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        rows, grad_rows, dtype = as_rows(x), as_rows(grad_y), compute_dtype(x.dtype)
        scale = weight.to(dtype)
        grad_x = x.new_empty(rows.shape) if need_x else None
        grad_weight = torch.zeros_like(scale)
        for some in row_chunks(rows, NORM_CHUNK_ELEMENTS):
            normalized = rows[some] * inverse_rms[some]
            wide_grad = grad_rows[some].to(dtype)
            product = wide_grad * normalized
            if need_weight:
                grad_weight += product.sum(0)
            if grad_x is not None:
                mean_projected = torch.mv(product, scale).div_(rows.shape[1]).unsqueeze(1)
                scaled = wide_grad * scale
                grad_x[some] = scaled.addcmul_(normalized, mean_projected, value=-1).mul_(inverse_rms[some])
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return grad_x, grad_weight.to(weight.dtype) if need_weight else None, None


def _triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The Triton kernels behind one autograd function."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Saves x, the weight and one fp32 number per row; the normalized rows are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """One program per row."""
        rows, weight = as_rows(x), weight.contiguous()
        num_rows, num_columns = rows.shape
        block = whole_row_block("rms_norm", num_columns)
        y = x.new_empty(x.shape)
        inverse_rms = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        arguments = (rows, weight, y, inverse_rms, rows.stride(0), num_columns, eps)
        constants = {"BLOCK": block, "num_warps": num_warps_for(block)}
        launch(_forward_kernel, (num_rows,), *arguments, device=x.device, **constants)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Input gradient per row; the weight gradient as partial sums per program, added up in fp32."""
        x, weight, inverse_rms = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        rows, grad_rows = as_rows(x), as_rows(grad_y)
        num_rows, num_columns = rows.shape
        num_programs = min(num_rows, BACKWARD_PROGRAMS)
        grad_x = x.new_empty(x.shape) if need_x else None
        partial = torch.empty(num_programs, num_columns, dtype=torch.float32, device=x.device)
        block = whole_row_block("rms_norm", num_columns)
        arguments = (rows, grad_rows, weight, inverse_rms, rows if grad_x is None else grad_x, partial)
        sizes = (rows.stride(0), grad_rows.stride(0), num_rows, num_columns, num_programs)
        needs = {"NEED_X": need_x, "NEED_WEIGHT": need_weight}
        constants = {**needs, "BLOCK": block, "num_warps": num_warps_for(block)}
        launch(_backward_kernel, (num_programs,), *arguments, *sizes, device=x.device, **constants)
        return grad_x, partial.sum(0).to(weight.dtype) if need_weight else None, None


@jit
def _forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    inverse_rms_ptr: tl.tensor,
    x_stride: tl.tensor,
    num_columns: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Normalize one row, held whole in registers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / num_columns + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = x * inverse_rms * weight
    tl.store(y_ptr + row * num_columns + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_rms_ptr + row, inverse_rms)


@jit
def _backward_kernel(
    x_ptr: tl.tensor,
    grad_y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    inverse_rms_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    weight_partial_ptr: tl.tensor,
    x_stride: tl.tensor,
    grad_y_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_programs: tl.tensor,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Gradients of rows program, program + num_programs, ...; the weight gradient stays in registers until the end."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for row_index in range(program, num_rows, num_programs):
        row = tl.cast(row_index, tl.int64)
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + row * grad_y_stride + columns, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.load(inverse_rms_ptr + row)
        normalized = x * inverse_rms
        if NEED_X:
            scaled = grad_y * weight
            mean_projected = tl.sum(scaled * normalized, axis=0) / num_columns
            grad_x = (scaled - normalized * mean_projected) * inverse_rms
            tl.store(grad_x_ptr + row * num_columns + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if NEED_WEIGHT:
            weight_sum += grad_y * normalized
    if NEED_WEIGHT:
        tl.store(weight_partial_ptr + program.to(tl.int64) * num_columns + columns, weight_sum, mask=inside)


RMS_NORM = Kernel(name="rms_norm", reference=_reference, triton=_triton)
