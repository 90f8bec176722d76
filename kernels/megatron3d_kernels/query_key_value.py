"""Queries, keys and values as views of the one projection that makes them, with rotary positions put in where they lie.

The projection's output [S, B, O] holds the queries of all heads, then the keys, then the values. Forward: three views,
queries and keys turned in place; nothing is copied, and nothing is kept but the angles. Backward: one pass takes the
three gradients, in whatever order of memory attention left them, turns those of queries and keys back, and writes all
to one [S, B, O]. The gradient of the projection's bias, the sum of that over S and B, is made in the same pass.

Dims: S sequence, B batch, N query heads, G key and value heads, D head size, O = (N + 2 G) D, R rotated part of D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron3d_kernels.activation import with_bias_gradient
from megatron3d_kernels.launch import KernelError, block_of, jit, launch, tl
from megatron3d_kernels.rotary import ROTARY, Angles, Rotate, angles_of, turned
from megatron3d_kernels.selection import DEFAULT_SELECTION, Kernel, Selection

HEADS_PER_PROGRAM = 16
SUM_PROGRAMS = 256
"""Programs along the rows where the gradient of a bias is summed: each adds up its rows before one torch sum over
programs. A fixed number, not the device's, keeps the order of summation the same on every GPU."""

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [B, N, S, D], keys and values [B, G, S, D], or their gradients."""


@dataclass(frozen=True)
class Rotation:
    """What turns queries and keys: `rotate` by `angles` of every position."""

    angles: Angles
    interleaved: bool
    rotate: Rotate


Gradient = Callable[[Heads, Rotation | None, torch.Tensor, bool], torch.Tensor | None]
"""(gradients of the heads, rotation, the gradient [S, B, O] to fill, whether its sums are wanted) -> sums [O]."""


@dataclass(frozen=True)
class _Way:
    """How one call is computed: N and G, how pairs are turned (None where they are not), and the gradient."""

    heads: tuple[int, int]
    interleaved: bool
    rotate: Rotate | None
    gradient: Gradient

    def rotation(self, cos: torch.Tensor | None, sin: torch.Tensor | None) -> Rotation | None:
        """By these angles."""
        if cos is None or sin is None or self.rotate is None:
            return None
        return Rotation((cos, sin), self.interleaved, self.rotate)


def query_key_value(
    qkv_SBO: torch.Tensor,
    heads: tuple[int, int],
    rotary: Angles | None = None,
    *,
    interleaved: bool = False,
    bias: torch.Tensor | None = None,
    selection: Selection = DEFAULT_SELECTION,
) -> Heads:
    """Views [B, N, S, D], [B, G, S, D], [B, G, S, D] of a projection's output, which is overwritten by the rotation.

    Args:
        qkv_SBO: the output; nobody else may read it.
        heads: N and G.
        rotary: cos and sin as for `apply_rotary`; None leaves queries and keys as they are.
        interleaved: how rotary pairs lie.
        bias: [O], which the projection has added already; its gradient is made here, and not there.
        selection: picks the implementations.

    Raises KernelError where the shapes do not fit.
    """
    queries, keys = heads
    if qkv_SBO.dim() != 3 or qkv_SBO.shape[-1] % (queries + 2 * keys):
        raise KernelError(
            f"query_key_value needs [S, B, (N + 2 G) D] with N, G = {heads}, but it got {tuple(qkv_SBO.shape)}."
        )
    if selection.is_fused(QUERY_KEY_VALUE.name):
        q, k, v = _views(with_bias_gradient(qkv_SBO, bias), heads)
        if rotary is not None:
            q, k = (turned(x, angles_of(x, *rotary), interleaved) for x in (q, k))
        return q, k, v
    cos, sin = (None, None) if rotary is None else angles_of(_views(qkv_SBO, heads)[0], *rotary)
    rotate = None if rotary is None else selection.pick(ROTARY, qkv_SBO)
    way = _Way(heads, interleaved, rotate, selection.pick(QUERY_KEY_VALUE, qkv_SBO))
    return _QueryKeyValue.apply(qkv_SBO, bias, cos, sin, way)


def _views(qkv_SBO: torch.Tensor, heads: tuple[int, int]) -> Heads:
    """The heads where they lie, [B, heads, S, D] each."""
    queries, keys = heads
    all_heads = qkv_SBO.unflatten(-1, (queries + 2 * keys, -1)).permute(1, 2, 0, 3)
    first = queries + keys
    return all_heads[:, :queries], all_heads[:, queries:first], all_heads[:, first:]


class _QueryKeyValue(torch.autograd.Function):
    """Keeps the angles only."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_SBO: torch.Tensor,
        bias: torch.Tensor | None,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        way: _Way,
    ) -> Heads:
        """Turn, then view."""
        ctx.save_for_backward(cos, sin)
        ctx.way, ctx.shape = way, qkv_SBO.shape
        # Autograd shall take the results for tensors of their own: it does not follow views through a function.
        ours_SBO, rotation = qkv_SBO.detach(), way.rotation(cos, sin)
        if rotation is not None:
            queries, keys = way.heads
            all_heads = ours_SBO.unflatten(-1, (queries + 2 * keys, -1)).permute(1, 2, 0, 3)
            turned = all_heads[:, : queries + keys]
            rotation.rotate(turned, rotation.angles, rotation.interleaved, False, turned)
        return _views(ours_SBO, way.heads)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """One gradient of the projection's output, and one of its bias."""
        grad_SBO, way = grad_q.new_empty(ctx.shape), ctx.way
        rotation = way.rotation(*ctx.saved_tensors)
        sums_O = way.gradient((grad_q, grad_k, grad_v), rotation, grad_SBO, ctx.needs_input_grad[1])
        return grad_SBO, sums_O, None, None, None


def _reference(
    grads: Heads, rotation: Rotation | None, grad_SBO: torch.Tensor, wants_sums: bool
) -> torch.Tensor | None:
    """Plain torch."""
    slots = _views(grad_SBO, (grads[0].shape[1], grads[1].shape[1]))
    for grad, slot, turns in zip(grads, slots, (True, True, False), strict=True):
        if rotation is not None and turns:
            rotation.rotate(grad, rotation.angles, rotation.interleaved, True, slot)
        else:
            slot.copy_(grad)
    return grad_SBO.flatten(0, 1).sum(0) if wants_sums else None


def _triton(grads: Heads, rotation: Rotation | None, grad_SBO: torch.Tensor, wants_sums: bool) -> torch.Tensor | None:
    """One program per group of heads and position, or some of the positions where sums are wanted."""
    sequence, batch, width = grad_SBO.shape
    grad_q, grad_k, grad_v = (one if one.stride(-1) == 1 else one.contiguous() for one in grads)
    queries, keys, head_size = grad_q.shape[1], grad_k.shape[1], grad_q.shape[3]
    rows, total = sequence * batch, queries + 2 * keys
    cos, sin = (grad_q[:, 0], grad_q[:, 0]) if rotation is None else rotation.angles
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    half = 0 if rotation is None else cos.shape[-1]
    programs = min(rows, SUM_PROGRAMS) if wants_sums else rows
    sums = torch.empty((programs, width) if wants_sums else 1, dtype=torch.float32, device=grad_SBO.device)
    strides = [stride for one in (grad_q, grad_k, grad_v) for stride in one.stride()[:3]]
    sizes = (queries, keys, batch, rows, programs, half, head_size)
    block_heads = block_of(total, limit=HEADS_PER_PROGRAM)
    constants = {
        "ROTATES": rotation is not None,
        "INTERLEAVED": rotation is not None and rotation.interleaved,
        "SUMS": wants_sums,
        "BLOCK_HEADS": block_heads,
        "BLOCK": block_of(head_size),
        "num_warps": 4,
    }
    arguments = (grad_q, grad_k, grad_v, cos, sin, grad_SBO, sums, *sizes, *strides, *cos.stride())
    launch(_gradient_kernel, (programs, -(-total // block_heads)), *arguments, device=grad_SBO.device, **constants)
    return sums.sum(0) if wants_sums else None


@jit
def partners(columns: tl.tensor, half: tl.tensor, INTERLEAVED: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of each column of a head: whether it is the first of its rotary pair, which pair, and the other's column."""
    if INTERLEAVED:
        is_first, pair = columns % 2 == 0, columns // 2
        partner = tl.where(is_first, columns + 1, columns - 1)
    else:
        is_first, pair = columns < half, tl.where(columns < half, columns, columns - half)
        partner = tl.where(is_first, columns + half, columns - half)
    return is_first, pair, partner


@jit
def load_of_heads(
    q_row: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    heads: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    q_stride_n: tl.tensor,
    k_stride_n: tl.tensor,
    v_stride_n: tl.tensor,
) -> tl.tensor:
    """Columns of some heads, numbered through queries, keys and values: each from the one tensor that has it."""
    key = heads - num_queries
    value = key - num_keys
    of_keys = inside & (key >= 0) & (value < 0)
    q = tl.load(q_row + heads * q_stride_n + columns, mask=inside & (key < 0), other=0.0).to(tl.float32)
    k = tl.load(k_row + key * k_stride_n + columns, mask=of_keys, other=0.0).to(tl.float32)
    v = tl.load(v_row + value * v_stride_n + columns, mask=inside & (value >= 0), other=0.0).to(tl.float32)
    return q + k + v


@jit
def _gradient_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    batch: tl.tensor,
    num_rows: tl.tensor,
    num_programs: tl.tensor,
    half: tl.tensor,
    head_size: tl.tensor,
    q_stride_b: tl.tensor,
    q_stride_n: tl.tensor,
    q_stride_s: tl.tensor,
    k_stride_b: tl.tensor,
    k_stride_n: tl.tensor,
    k_stride_s: tl.tensor,
    v_stride_b: tl.tensor,
    v_stride_n: tl.tensor,
    v_stride_s: tl.tensor,
    angle_stride_b: tl.tensor,
    angle_stride_s: tl.tensor,
    angle_stride_r: tl.tensor,
    ROTATES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rows program, program + num_programs, ... of up to BLOCK_HEADS heads; a row is a position of a sample."""
    program = tl.program_id(0)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    num_heads = num_queries + 2 * num_keys
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (heads < num_heads) & (columns < head_size)
    is_first, pair, partner = partners(columns, half, INTERLEAVED)
    in_pairs = columns < 2 * half
    turns = in_pairs & (heads < num_queries + num_keys)  # values are not turned
    total = tl.zeros((BLOCK_HEADS, BLOCK), dtype=tl.float32)
    for row_index in range(program, num_rows, num_programs):
        row = tl.cast(row_index, tl.int64)
        s = row // batch
        b = row % batch
        q_row = q_ptr + b * q_stride_b + s * q_stride_s
        k_row = k_ptr + b * k_stride_b + s * k_stride_s
        v_row = v_ptr + b * v_stride_b + s * v_stride_s
        grad = load_of_heads(
            q_row, k_row, v_row, heads, columns, inside, num_queries, num_keys, q_stride_n, k_stride_n, v_stride_n
        )
        if ROTATES:
            other = load_of_heads(
                q_row, k_row, v_row, heads, partner, turns, num_queries, num_keys, q_stride_n, k_stride_n, v_stride_n
            )
            angle = b * angle_stride_b + s * angle_stride_s + pair * angle_stride_r
            cos = tl.load(cos_ptr + angle, mask=in_pairs, other=1.0).to(tl.float32)
            sin = tl.load(sin_ptr + angle, mask=in_pairs, other=0.0).to(tl.float32)
            grad = tl.where(turns, grad * cos + tl.where(is_first, other, -other) * sin, grad)
        rounded = grad.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * num_heads + heads) * head_size + columns, rounded, mask=inside)
        total += rounded.to(tl.float32)
    if SUMS:
        sums_row = sums_ptr + (program.to(tl.int64) * num_heads + heads) * head_size
        tl.store(sums_row + columns, total, mask=inside)


QUERY_KEY_VALUE: Kernel[Gradient] = Kernel(name="query_key_value", reference=_reference, triton=_triton)
