"""Rotary position embedding: pairs of head components turned by an angle that grows with the position.

    (a, b) -> (a cos - b sin, b cos + a sin)

The pairs are (i, i + R/2) in "halves" (GPT-NeoX, Llama) and (2i, 2i + 1) "interleaved" (GPT-J); R <= D leading
components are turned, the rest passes through. A rotation's transpose is the rotation by the opposite angle, and so is
its backward; only cos and sin are kept.
Source: Su et al., "RoFormer" (2021), equation 34.

Dims: B batch, N heads, S sequence, D head size, R rotated part of D. Every tensor may have any strides: a transposed
view of a [S, B, N, D] tensor is read where it lies and the result keeps its order in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron3d_kernels.launch import KernelError, block_of, compute_dtype, jit, launch, tl
from megatron3d_kernels.selection import DEFAULT_SELECTION, Kernel, Selection

HEADS_PER_PROGRAM = 16

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, [B, S, R/2] each."""

Rotate = Callable[[torch.Tensor, Angles, bool, bool, torch.Tensor], None]
"""(x [B, N, S, D], angles, interleaved, inverse, y) puts the rotated x into y, which may be x itself."""


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    *,
    selection: Selection = DEFAULT_SELECTION,
) -> torch.Tensor:
    """Rotate x [B, N, S, D] by cos and sin, [S, R/2] or [B, S, R/2] (positions per sample), which get no gradient.

    The arithmetic is fp32 whatever the dtype of x; the result has x's dtype. Give cos and sin in fp32.

    Raises KernelError where the shapes do not fit.
    """
    if selection.is_fused(ROTARY.name):
        return turned(x, angles_of(x, cos, sin), interleaved)
    return _Rotary.apply(x, *angles_of(x, cos, sin), interleaved, selection.pick(ROTARY, x))


def angles_of(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Angles:
    """cos and sin of each position of x [B, N, S, D]; raises KernelError where the shapes do not fit."""
    if x.dim() != 4 or cos.shape != sin.shape or cos.dim() not in (2, 3) or 2 * cos.shape[-1] > x.shape[-1]:
        raise KernelError(_misfit(x, cos, sin))
    batch, _, sequence, _ = x.shape
    table = cos if cos.dim() == 3 else cos.unsqueeze(0)
    if table.shape[0] not in (1, batch) or table.shape[1] != sequence:
        raise KernelError(_misfit(x, cos, sin))
    shape = (batch, sequence, cos.shape[-1])
    return cos.expand(shape), sin.expand(shape)


def _misfit(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str:
    """The sentence for shapes that do not belong together."""
    return (
        f"apply_rotary needs x [B, N, S, D] and cos, sin [S, R/2] or [B, S, R/2] with R <= D, but x is "
        f"{tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)}."
    )


class _Rotary(torch.autograd.Function):
    """Forward turns by the angle, backward by its negative."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, rotate: Rotate
    ) -> torch.Tensor:
        """Save the angles only."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.rotate = interleaved, rotate
        y = torch.empty_like(x)
        rotate(x, (cos, sin), interleaved, False, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Turn the gradient back."""
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        cos, sin = ctx.saved_tensors
        grad_x = torch.empty_like(grad_y)
        ctx.rotate(grad_y, (cos, sin), ctx.interleaved, True, grad_x)
        return grad_x, None, None, None, None


def turned(x: torch.Tensor, angles: Angles, interleaved: bool) -> torch.Tensor:
    """The definition, for a compiler that fuses it with what is around it and makes its backward."""
    dtype = compute_dtype(x.dtype)
    half = angles[0].shape[-1]
    cos, sin = (one.unsqueeze(1).to(dtype) for one in angles)
    first, second = (part.to(dtype) for part in _pair(x, half, interleaved))
    results = (first * cos - second * sin, second * cos + first * sin)
    pairs = torch.stack(results, dim=-1).flatten(-2) if interleaved else torch.cat(results, dim=-1)
    return torch.cat((pairs.to(x.dtype), x[..., 2 * half :]), dim=-1)


def _reference(x: torch.Tensor, angles: Angles, interleaved: bool, inverse: bool, y: torch.Tensor) -> None:
    """Plain torch; the two results are written into their places, without a concatenation."""
    dtype = compute_dtype(x.dtype)
    half = angles[0].shape[-1]
    cos, sin = (one.unsqueeze(1).to(dtype) for one in angles)
    if inverse:
        sin = -sin
    first, second = _pair(x, half, interleaved)
    first, second = first.to(dtype), second.to(dtype)
    y_first, y_second = _pair(y, half, interleaved)
    turned_first = (first * cos).addcmul_(second, sin, value=-1)
    y_second.copy_((second * cos).addcmul_(first, sin))
    y_first.copy_(turned_first)
    if y is not x and 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]


def _pair(x: torch.Tensor, half: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and of the second members of all pairs, [..., R/2] each."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def _triton(x: torch.Tensor, angles: Angles, interleaved: bool, inverse: bool, y: torch.Tensor) -> None:
    """One program per position and group of heads, so that the angles are read once for the group."""
    batch, num_heads, sequence, head_size = x.shape
    cos, sin = angles
    half = cos.shape[-1]
    heads = block_of(num_heads, limit=HEADS_PER_PROGRAM)
    tail = 0 if y is x else head_size - 2 * half
    strides = (*x.stride(), *y.stride(), *cos.stride(), *sin.stride())
    arguments = (x, cos, sin, y, num_heads, sequence, half, head_size, *strides)
    pairing = {"INTERLEAVED": interleaved, "INVERSE": inverse}
    blocks = {"BLOCK_HEADS": heads, "BLOCK_HALF": block_of(half), "HAS_TAIL": tail > 0, "BLOCK_TAIL": block_of(tail)}
    grid = (batch * sequence, -(-num_heads // heads))
    launch(_rotary_kernel, grid, *arguments, device=x.device, **pairing, **blocks, num_warps=4)


@jit
def _rotary_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_heads: tl.tensor,
    sequence: tl.tensor,
    half: tl.tensor,
    head_size: tl.tensor,
    x_stride_b: tl.tensor,
    x_stride_n: tl.tensor,
    x_stride_s: tl.tensor,
    x_stride_d: tl.tensor,
    y_stride_b: tl.tensor,
    y_stride_n: tl.tensor,
    y_stride_s: tl.tensor,
    y_stride_d: tl.tensor,
    cos_stride_b: tl.tensor,
    cos_stride_s: tl.tensor,
    cos_stride_r: tl.tensor,
    sin_stride_b: tl.tensor,
    sin_stride_s: tl.tensor,
    sin_stride_r: tl.tensor,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
) -> None:
    """Rotate one position of up to BLOCK_HEADS heads and copy the part that is not rotated."""
    program = tl.program_id(0).to(tl.int64)
    b = program // sequence
    s = program % sequence
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    pairs = tl.arange(0, BLOCK_HALF)
    in_pairs = pairs < half
    cos = tl.load(cos_ptr + b * cos_stride_b + s * cos_stride_s + pairs * cos_stride_r, mask=in_pairs, other=0.0)
    sin = tl.load(sin_ptr + b * sin_stride_b + s * sin_stride_s + pairs * sin_stride_r, mask=in_pairs, other=0.0)
    cos = cos.to(tl.float32)[None, :]
    sin = sin.to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        first_at = 2 * pairs[None, :]
        second_at = first_at + 1
    else:
        first_at = pairs[None, :]
        second_at = first_at + half
    x_row = x_ptr + b * x_stride_b + s * x_stride_s + heads * x_stride_n
    y_row = y_ptr + b * y_stride_b + s * y_stride_s + heads * y_stride_n
    inside = (heads < num_heads) & in_pairs[None, :]
    first = tl.load(x_row + first_at * x_stride_d, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_row + second_at * x_stride_d, mask=inside, other=0.0).to(tl.float32)
    element = y_ptr.dtype.element_ty
    tl.store(y_row + first_at * y_stride_d, (first * cos - second * sin).to(element), mask=inside)
    tl.store(y_row + second_at * y_stride_d, (second * cos + first * sin).to(element), mask=inside)
    if HAS_TAIL:
        tail = 2 * half + tl.arange(0, BLOCK_TAIL)[None, :]
        in_tail = (heads < num_heads) & (tail < head_size)
        tl.store(y_row + tail * y_stride_d, tl.load(x_row + tail * x_stride_d, mask=in_tail), mask=in_tail)


ROTARY: Kernel[Rotate] = Kernel(name="rotary", reference=_reference, triton=_triton)
