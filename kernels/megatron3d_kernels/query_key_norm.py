"""Queries, keys and values of the one projection that makes them, each head's queries and keys normalised, then turned.

    y = turn(norm(x))

The norm is RMSNorm or LayerNorm over a head (`rms_norm.py`, `layer_norm.py`), the turn that of `rotary.py`.

The projection's output [S, B, O] holds the queries of all heads, then the keys, then the values. Forward: one kernel
reads queries and keys where they lie and writes them, normalised and turned, to one [S, B, N + G, D]; the values are a
view. Kept are the projection's output and the angles, and no statistics: the backward has whole heads in registers and
makes them again. Backward: one kernel takes the three gradients in whatever order of memory attention left them, turns
those of queries and keys back, makes the gradient of the norm's input, and writes all to one [S, B, O]. The sums of
that over S and B, the gradient of the projection's bias, and the gradients of the norms' weights are made in the same
pass. The normalised values are not rounded before they are turned, nor their gradients.

The reference is the composition of `query_key_value`, the norms and `apply_rotary`.

Dims: S sequence, B batch, N query heads, G key and value heads, D head size, O = (N + 2 G) D, R rotated part of D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron3d_kernels.launch import KernelError, as_rows, block_of, jit, launch, tl
from megatron3d_kernels.layer_norm import layer_norm
from megatron3d_kernels.query_key_value import Heads, load_of_heads, partners, query_key_value
from megatron3d_kernels.rms_norm import rms_norm
from megatron3d_kernels.rotary import Angles, angles_of, apply_rotary
from megatron3d_kernels.selection import DEFAULT_SELECTION, REFERENCE, Kernel, Selection

ELEMENTS_PER_PROGRAM = 2048
"""Elements of heads, sixteen of 128, that a program has in registers at a time."""
SUM_PROGRAMS = 256
"""Programs of the backward along the rows; each adds up its rows' sums before one torch sum over programs. A fixed
number, not the device's, keeps the order of summation the same on every GPU."""

_REFERENCES = Selection(REFERENCE)


@dataclass(frozen=True)
class HeadNorms:
    """The norms of queries and of keys, two RMSNorms or two LayerNorms of heads of D.

    Attributes:
        weights: [D] of queries and of keys.
        biases: the same, or None.
        eps: added to the variance or the mean of squares.
        is_rms: whether they are RMSNorms.
    """

    weights: tuple[torch.Tensor, torch.Tensor]
    biases: tuple[torch.Tensor, torch.Tensor] | None
    eps: float
    is_rms: bool


Normalise = Callable[[torch.Tensor, tuple[int, int], HeadNorms, Angles | None, bool, torch.Tensor | None], Heads]
"""(projection's output, N and G, norms, angles, interleaved, the projection's bias) -> heads."""


def normalised_query_key_value(
    qkv_SBO: torch.Tensor,
    heads: tuple[int, int],
    norms: HeadNorms,
    rotary: Angles | None = None,
    *,
    interleaved: bool = False,
    bias: torch.Tensor | None = None,
    selection: Selection = DEFAULT_SELECTION,
) -> Heads:
    """Queries [B, N, S, D] and keys [B, G, S, D], normalised and turned, and values [B, G, S, D], a view.

    Args:
        qkv_SBO: the projection's output, which stays as it is and is kept for the backward.
        heads: N and G.
        norms: of each head's queries and keys.
        rotary: cos and sin as for `apply_rotary`; None turns nothing.
        interleaved: how rotary pairs lie.
        bias: [O], which the projection has added already; its gradient is made here, and not there.
        selection: picks the implementations.

    Raises KernelError where the shapes do not fit.
    """
    size = norms.weights[0].shape[-1]
    if qkv_SBO.dim() != 3 or qkv_SBO.shape[-1] != (heads[0] + 2 * heads[1]) * size:
        raise KernelError(
            f"normalised_query_key_value needs [S, B, (N + 2 G) D] with N, G = {heads} and norms of D = {size}, but it "
            f"got {tuple(qkv_SBO.shape)}."
        )
    return selection.pick(QUERY_KEY_NORM, qkv_SBO)(qkv_SBO, heads, norms, rotary, interleaved, bias)


def _reference(
    qkv_SBO: torch.Tensor,
    heads: tuple[int, int],
    norms: HeadNorms,
    rotary: Angles | None,
    interleaved: bool,
    bias: torch.Tensor | None,
) -> Heads:
    """One after the other."""
    q, k, v = query_key_value(qkv_SBO, heads, bias=bias, selection=_REFERENCES)
    if norms.is_rms:
        q, k = (rms_norm(x, w, norms.eps, selection=_REFERENCES) for x, w in zip((q, k), norms.weights, strict=True))
    else:
        parameters = zip((q, k), norms.weights, norms.biases or (None, None), strict=True)
        q, k = (layer_norm(x, weight, shift, norms.eps, selection=_REFERENCES) for x, weight, shift in parameters)
    if rotary is not None:
        q, k = (apply_rotary(x, *rotary, interleaved, selection=_REFERENCES) for x in (q, k))
    return q, k, v


@dataclass(frozen=True)
class _Way:
    """How one call is computed: N and G, how pairs lie, and the norms' kind."""

    heads: tuple[int, int]
    interleaved: bool
    eps: float
    is_rms: bool

    def blocks(self, num_heads: int, head_size: int) -> dict[str, int]:
        """Heads and columns of a program."""
        block = block_of(head_size)
        block_heads = block_of(num_heads, limit=max(1, ELEMENTS_PER_PROGRAM // block))
        return {"BLOCK_HEADS": block_heads, "BLOCK": block, "num_warps": 4}

    def constants(self, cos: torch.Tensor | None, shift: torch.Tensor | None) -> dict[str, bool]:
        """What both kernels are compiled for."""
        pairs = {"ROTATES": cos is not None, "INTERLEAVED": cos is not None and self.interleaved}
        return {**pairs, "RMS": self.is_rms, "HAS_SHIFT": shift is not None}


def _triton(
    qkv_SBO: torch.Tensor,
    heads: tuple[int, int],
    norms: HeadNorms,
    rotary: Angles | None,
    interleaved: bool,
    bias: torch.Tensor | None,
) -> Heads:
    """The Triton kernels behind one autograd function."""
    cos, sin = None, None
    if rotary is not None:
        all_heads = qkv_SBO.unflatten(-1, (heads[0] + 2 * heads[1], -1)).permute(1, 2, 0, 3)
        cos, sin = angles_of(all_heads, *rotary)
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
    way = _Way(heads, interleaved, norms.eps, norms.is_rms)
    return _Normalised.apply(qkv_SBO, bias, *norms.weights, *(norms.biases or (None, None)), cos, sin, way)


class _Normalised(torch.autograd.Function):
    """Keeps the projection's output, the parameters and the angles."""

    @staticmethod
    def forward(ctx: Any, qkv_SBO: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> Heads:
        """One program per position and group of heads; `rest` is weights, biases, angles, way."""
        *parameters, cos, sin, way = rest
        parameters = [None if one is None else one.contiguous() for one in parameters]
        ctx.save_for_backward(qkv_SBO, *parameters, cos, sin)
        ctx.way = way
        queries, keys = way.heads
        rows = as_rows(qkv_SBO)
        sequence, batch, _ = qkv_SBO.shape
        head_size = qkv_SBO.shape[2] // (queries + 2 * keys)
        qk_SBND = qkv_SBO.new_empty(sequence, batch, queries + keys, head_size)
        blocks = way.blocks(queries + keys, head_size)
        sizes = (queries, queries + keys, batch, _half(cos), head_size, rows.stride(0), way.eps)
        arguments = (rows, *_pointers(parameters), *_angles(cos, sin, qk_SBND), qk_SBND, *sizes, *_angle_strides(cos))
        grid = (len(rows), -(-(queries + keys) // blocks["BLOCK_HEADS"]))
        constants = way.constants(cos, parameters[2])
        launch(_forward_kernel, grid, *arguments, device=rows.device, **constants, **blocks)
        qk = qk_SBND.permute(1, 2, 0, 3)
        # Autograd shall take the values for a tensor of their own: it does not follow views through a function.
        all_heads = qkv_SBO.detach().unflatten(-1, (queries + 2 * keys, head_size)).permute(1, 2, 0, 3)
        return qk[:, :queries], qk[:, queries:], all_heads[:, queries + keys :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """One gradient of the projection's output, one of its bias, and those of weights and biases of the norms."""
        qkv_SBO, *parameters, cos, sin = ctx.saved_tensors
        way, wants_sums, wants_parameters = ctx.way, ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:6])
        grad_q, grad_k, grad_v = (one if one.stride(-1) == 1 else one.contiguous() for one in grads)
        queries, keys = way.heads
        rows, head_size, total = as_rows(qkv_SBO), grad_q.shape[3], queries + 2 * keys
        num_rows, width = rows.shape
        blocks = way.blocks(total, head_size)
        groups, programs = -(-total // blocks["BLOCK_HEADS"]), min(num_rows, SUM_PROGRAMS)
        grad_SBO = qkv_SBO.new_empty(qkv_SBO.shape)
        sums = rows.new_empty((programs, width) if wants_sums else (1,), dtype=torch.float32)
        num_parameters = 2 if parameters[2] is None else 4
        partials = rows.new_empty((programs * groups, num_parameters, head_size), dtype=torch.float32)
        strides = [stride for one in (grad_q, grad_k, grad_v) for stride in one.stride()[:3]]
        sizes = (queries, keys, qkv_SBO.shape[1], num_rows, programs, _half(cos), head_size, rows.stride(0), way.eps)
        pointers = (grad_q, grad_k, grad_v, rows, *parameters[:2], *_angles(cos, sin, rows))
        arguments = (*pointers, grad_SBO, sums, partials, *sizes, *strides, *_angle_strides(cos))
        constants = way.constants(cos, parameters[2]) | {"SUMS": wants_sums}
        launch(_backward_kernel, (programs, groups), *arguments, device=rows.device, **constants, **blocks)
        of_parameters: list[torch.Tensor | None] = [None] * 4
        if wants_parameters:
            of_parameters[:num_parameters] = partials.sum(0).to(parameters[0].dtype).unbind()
        return grad_SBO, sums.sum(0) if wants_sums else None, *of_parameters, None, None, None


def _half(cos: torch.Tensor | None) -> int:
    """R / 2."""
    return 0 if cos is None else cos.shape[-1]


def _pointers(parameters: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Weights for the biases that there are not, which a kernel does not read."""
    return parameters[:2] * 2 if parameters[2] is None else parameters


def _angles(cos: torch.Tensor | None, sin: torch.Tensor | None, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The angles, or another tensor where there are none and a kernel reads none."""
    return (other, other) if cos is None or sin is None else (cos, sin)


def _angle_strides(cos: torch.Tensor | None) -> tuple[int, ...]:
    """Of sample, position and pair, alike for cos and sin."""
    return (0, 0, 0) if cos is None else cos.stride()


@jit
def _statistics(
    x: tl.tensor,
    inside: tl.tensor,
    head_size: tl.tensor,
    eps: tl.tensor,
    RMS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Mean (0 for RMSNorm) and inverse deviation of each head, [heads, 1]; x is 0 outside."""
    if RMS:
        mean = tl.zeros((BLOCK_HEADS, 1), dtype=tl.float32)
        squares = tl.sum(x * x, axis=1)[:, None]
    else:
        mean = tl.sum(x, axis=1)[:, None] / head_size
        centred = tl.where(inside, x - mean, 0.0)
        squares = tl.sum(centred * centred, axis=1)[:, None]
    return mean, 1.0 / tl.sqrt(squares / head_size + eps)


@jit
def _of_heads(
    query_ptr: tl.tensor, key_ptr: tl.tensor, is_query: tl.tensor, columns: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """A parameter [D] of queries or of keys for each head, [heads, columns]."""
    of_queries = tl.load(query_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    of_keys = tl.load(key_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_query, of_queries, of_keys)


@jit
def _turned(
    own: tl.tensor,
    other: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    angle: tl.tensor,
    is_first: tl.tensor,
    in_pairs: tl.tensor,
) -> tl.tensor:
    """Columns turned with the others of their pairs; with the others negated, turned back."""
    cos = tl.load(cos_ptr + angle, mask=in_pairs, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=in_pairs, other=0.0).to(tl.float32)
    return own * cos + tl.where(is_first, -other, other) * sin


@jit
def _norm_gradient(
    grad: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    inside: tl.tensor,
    head_size: tl.tensor,
    eps: tl.tensor,
    RMS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The gradient of x, and x normalised."""
    mean, inverse = _statistics(x, inside, head_size, eps, RMS, BLOCK_HEADS)
    normalized = tl.where(inside, (x - mean) * inverse, 0.0)
    scaled = grad * weight
    of_norm = scaled - normalized * (tl.sum(scaled * normalized, axis=1)[:, None] / head_size)
    if not RMS:
        of_norm -= tl.sum(scaled, axis=1)[:, None] / head_size
    return of_norm * inverse, normalized


@jit
def _forward_kernel(
    x_ptr: tl.tensor,
    query_weight_ptr: tl.tensor,
    key_weight_ptr: tl.tensor,
    query_shift_ptr: tl.tensor,
    key_shift_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_queries: tl.tensor,
    num_heads: tl.tensor,
    batch: tl.tensor,
    half: tl.tensor,
    head_size: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    angle_stride_b: tl.tensor,
    angle_stride_s: tl.tensor,
    angle_stride_r: tl.tensor,
    ROTATES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    RMS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Up to BLOCK_HEADS heads of queries and keys of one position of a sample."""
    row = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (heads < num_heads) & (columns < head_size)
    is_query = heads < num_queries
    x_row = x_ptr + row * x_stride + heads * head_size
    x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
    mean, inverse = _statistics(x, inside, head_size, eps, RMS, BLOCK_HEADS)
    weight = _of_heads(query_weight_ptr, key_weight_ptr, is_query, columns, columns < head_size)
    y = (x - mean) * inverse * weight
    if HAS_SHIFT:
        y += _of_heads(query_shift_ptr, key_shift_ptr, is_query, columns, columns < head_size)
    if ROTATES:
        is_first, pair, partner = partners(columns, half, INTERLEAVED)
        in_pairs = columns < 2 * half
        other = tl.load(x_row + partner, mask=inside & in_pairs, other=0.0).to(tl.float32)
        other = (other - mean) * inverse * _of_heads(query_weight_ptr, key_weight_ptr, is_query, partner, in_pairs)
        if HAS_SHIFT:
            other += _of_heads(query_shift_ptr, key_shift_ptr, is_query, partner, in_pairs)
        angle = (row % batch) * angle_stride_b + (row // batch) * angle_stride_s + pair * angle_stride_r
        y = _turned(y, other, cos_ptr, sin_ptr, angle, is_first, in_pairs)
    y_row = y_ptr + (row * num_heads + heads) * head_size
    tl.store(y_row + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _store_sums(
    to_ptr: tl.tensor,
    sums: tl.tensor,
    is_query: tl.tensor,
    is_normed: tl.tensor,
    columns: tl.tensor,
    head_size: tl.tensor,
) -> None:
    """The sums of one parameter over this program's heads of queries, and next to them those of keys, [2, D]."""
    of_queries = tl.sum(tl.where(is_query, sums, 0.0), axis=0)[None, :]
    of_keys = tl.sum(tl.where(is_query, 0.0, tl.where(is_normed, sums, 0.0)), axis=0)[None, :]
    tl.store(to_ptr + columns, of_queries, mask=columns < head_size)
    tl.store(to_ptr + head_size + columns, of_keys, mask=columns < head_size)


@jit
def _backward_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    x_ptr: tl.tensor,
    query_weight_ptr: tl.tensor,
    key_weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    batch: tl.tensor,
    num_rows: tl.tensor,
    num_programs: tl.tensor,
    half: tl.tensor,
    head_size: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
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
    RMS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rows program, program + num_programs, ... of up to BLOCK_HEADS heads; a row is a position of a sample."""
    program = tl.program_id(0)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    num_heads, columns = num_queries + 2 * num_keys, tl.arange(0, BLOCK)[None, :]
    inside = (heads < num_heads) & (columns < head_size)
    is_query, is_normed = heads < num_queries, heads < num_queries + num_keys
    weight = _of_heads(query_weight_ptr, key_weight_ptr, is_query, columns, columns < head_size)
    is_first, pair, partner = partners(columns, half, INTERLEAVED)
    in_pairs, turns = columns < 2 * half, (columns < 2 * half) & is_normed  # values are not turned
    total = tl.zeros((BLOCK_HEADS, BLOCK), dtype=tl.float32)
    weight_sum, shift_sum = total, total
    for row_index in range(program, num_rows, num_programs):
        row = tl.cast(row_index, tl.int64)
        s, b = row // batch, row % batch
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
            grad = tl.where(turns, _turned(grad, -other, cos_ptr, sin_ptr, angle, is_first, in_pairs), grad)
        x = tl.load(x_ptr + row * x_stride + heads * head_size + columns, mask=inside & is_normed, other=0.0)
        of_x, normalized = _norm_gradient(grad, x.to(tl.float32), weight, inside, head_size, eps, RMS, BLOCK_HEADS)
        rounded = tl.where(is_normed, of_x, grad).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * num_heads + heads) * head_size + columns, rounded, mask=inside)
        total += rounded.to(tl.float32)
        weight_sum, shift_sum = weight_sum + grad * normalized, shift_sum + grad
    if SUMS:
        tl.store(sums_ptr + (program.to(tl.int64) * num_heads + heads) * head_size + columns, total, mask=inside)
    group = program.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    to_ptr = partial_ptr + group * (4 if HAS_SHIFT else 2) * head_size
    _store_sums(to_ptr, weight_sum, is_query, is_normed, columns, head_size)
    if HAS_SHIFT:
        _store_sums(to_ptr + 2 * head_size, shift_sum, is_query, is_normed, columns, head_size)


QUERY_KEY_NORM: Kernel[Normalise] = Kernel(name="query_key_norm", reference=_reference, triton=_triton)
