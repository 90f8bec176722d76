"""Layer normalization over the last dimension, with the statistics in fp32.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), equation 4; the variance is the biased one. With
g = dy * weight and n = (x - mean) / std, the gradients are dx = (g - mean(g) - n * mean(g * n)) / std,
dweight = sum(dy * n) and dbias = sum(dy), the sums over all rows. H is the last dimension.
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
"""Programs of the backward kernel; each sums the weight gradients of its rows before one torch sum over programs.
A fixed number, not the device's, keeps the order of summation and so the result the same on every GPU."""


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    selection: Selection = DEFAULT_SELECTION,
) -> torch.Tensor:
    """Normalize x [..., H] to mean 0 and variance 1 per row, then scale by weight [H] and shift by bias [H] or None.

    The arithmetic is fp32 (fp64 for fp64 inputs); the result has the dtype of x.
    """
    return selection.pick(LAYER_NORM, x)(x, weight, bias, eps)


def _reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """torch's own kernel; parameters of another dtype than x are not rounded to x's.

    On CPU that kernel keeps statistics and sums weight gradients in bf16 or fp16 where x has that dtype, an error of
    several roundings, so narrow tensors are taken in chunks there, but widened whole in a graph that is traced for any
    number of rows.
    """
    dtype = compute_dtype(x.dtype)
    if x.dtype != dtype and not x.is_cuda and not torch.compiler.is_compiling():
        return _LayerNormByChunks.apply(x, weight, bias, eps)
    if weight.dtype == x.dtype and (x.dtype == dtype or x.is_cuda):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    shift = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), shift, eps).to(x.dtype)


class _LayerNormByChunks(torch.autograd.Function):
    """For bf16 and fp16 on a CPU: saves what `_LayerNorm` does; only a chunk of rows is ever held in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """torch's kernel for narrow rows with wide parameters, whose statistics are wide."""
        scale, shift = weight.float(), None if bias is None else bias.float()
        y, mean, inverse_std = torch.native_layer_norm(x, weight.shape, scale, shift, eps)
        ctx.save_for_backward(x, weight, mean.view(-1, 1), inverse_std.view(-1, 1))
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """torch's kernel for the narrow input gradient, whose arithmetic is wide. The gradients of parameters it would
        add up in x's dtype, so those are made of a widened chunk at a time."""
        x, weight, mean, inverse_std = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows, grad_rows, scale = as_rows(x), as_rows(grad_y), weight.float()
        shift, of_rows = scale if need_bias else None, torch.ops.aten.native_layer_norm_backward
        grad_x = None
        if need_x:
            grad_x, _, _ = of_rows(grad_rows, rows, weight.shape, mean, inverse_std, scale, shift, [True, False, False])
            grad_x = grad_x.view(x.shape)
        grad_weight, grad_bias = torch.zeros_like(scale), torch.zeros_like(scale)
        for some in row_chunks(rows, NORM_CHUNK_ELEMENTS) if need_weight or need_bias else ():
            wide_rows = (grad_rows[some].float(), rows[some].float())
            parameters = (weight.shape, mean[some], inverse_std[some], scale, shift)
            _, of_weight, of_bias = of_rows(*wide_rows, *parameters, [False, need_weight, need_bias])
            if need_weight:
                grad_weight += of_weight
            if need_bias:
                grad_bias += of_bias
        grad_shift = grad_bias.to(ctx.bias_dtype) if need_bias else None
        return grad_x, grad_weight.to(weight.dtype) if need_weight else None, grad_shift, None


def _triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The Triton kernels behind one autograd function."""
    return _LayerNorm.apply(x, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    """Saves x, the weight and two fp32 numbers per row; the normalized rows are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """One program per row."""
        rows, weight = as_rows(x), weight.contiguous()
        num_rows, num_columns = rows.shape
        block = whole_row_block("layer_norm", num_columns)
        y = x.new_empty(x.shape)
        mean = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        inverse_std = torch.empty_like(mean)
        shift = weight if bias is None else bias.contiguous()
        sizes = (rows.stride(0), num_columns, eps)
        constants = {"HAS_BIAS": bias is not None, "BLOCK": block, "num_warps": num_warps_for(block)}
        arguments = (rows, weight, shift, y, mean, inverse_std, *sizes)
        launch(_forward_kernel, (num_rows,), *arguments, device=x.device, **constants)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Input gradient per row; parameter gradients as partial sums per program, added up in fp32."""
        x, weight, mean, inverse_std = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows, grad_rows = as_rows(x), as_rows(grad_y)
        num_rows, num_columns = rows.shape
        num_programs = min(num_rows, BACKWARD_PROGRAMS)
        grad_x = x.new_empty(x.shape) if need_x else None
        partials = torch.empty(2, num_programs, num_columns, dtype=torch.float32, device=x.device)
        block = whole_row_block("layer_norm", num_columns)
        arguments = (rows, grad_rows, weight, mean, inverse_std, rows if grad_x is None else grad_x, *partials)
        sizes = (rows.stride(0), grad_rows.stride(0), num_rows, num_columns, num_programs)
        needs = {"NEED_X": need_x, "NEED_WEIGHT": need_weight, "NEED_BIAS": need_bias}
        constants = {**needs, "BLOCK": block, "num_warps": num_warps_for(block)}
        launch(_backward_kernel, (num_programs,), *arguments, *sizes, device=x.device, **constants)
        grad_weight = partials[0].sum(0).to(weight.dtype) if need_weight else None
        grad_bias = partials[1].sum(0).to(ctx.bias_dtype) if need_bias else None
        return grad_x, grad_weight, grad_bias, None


@jit
def _forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    inverse_std_ptr: tl.tensor,
    x_stride: tl.tensor,
    num_columns: tl.tensor,
    eps: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Normalize one row, held whole in registers; variance from the centred values, not from mean(x^2) - mean(x)^2."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / num_columns
    centred = tl.where(inside, x - mean, 0.0)
    inverse_std = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / num_columns + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = centred * inverse_std * weight
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * num_columns + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(inverse_std_ptr + row, inverse_std)


@jit
def _backward_kernel(
    x_ptr: tl.tensor,
    grad_y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    inverse_std_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    weight_partial_ptr: tl.tensor,
    bias_partial_ptr: tl.tensor,
    x_stride: tl.tensor,
    grad_y_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_programs: tl.tensor,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Gradients of rows program, program + num_programs, ...; parameter gradients stay in registers until the end."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for row_index in range(program, num_rows, num_programs):
        row = tl.cast(row_index, tl.int64)
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + row * grad_y_stride + columns, mask=inside, other=0.0).to(tl.float32)
        inverse_std = tl.load(inverse_std_ptr + row)
        normalized = tl.where(inside, (x - tl.load(mean_ptr + row)) * inverse_std, 0.0)
        if NEED_X:
            scaled = grad_y * weight
            mean_scaled = tl.sum(scaled, axis=0) / num_columns
            mean_projected = tl.sum(scaled * normalized, axis=0) / num_columns
            grad_x = (scaled - mean_scaled - normalized * mean_projected) * inverse_std
            tl.store(grad_x_ptr + row * num_columns + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if NEED_WEIGHT:
            weight_sum += grad_y * normalized
        if NEED_BIAS:
            bias_sum += grad_y
    at = program.to(tl.int64) * num_columns + columns
    if NEED_WEIGHT:
        tl.store(weight_partial_ptr + at, weight_sum, mask=inside)
    if NEED_BIAS:
        tl.store(bias_partial_ptr + at, bias_sum, mask=inside)


LAYER_NORM = Kernel(name="layer_norm", reference=_reference, triton=_triton)
