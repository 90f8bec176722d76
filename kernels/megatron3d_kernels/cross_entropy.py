"""The local pieces of cross-entropy over a vocabulary that is cut into shards.

A shard holds the logits of some neighbouring vocabulary entries, the first of which is entry `vocab_start`. The caller
joins the shards between the two pieces; communication is not a kernel's business. With m_r, s_r and t_r the three
numbers per row that `local_softmax_sums` gives for shard r:

    m = max of m_r                 s = sum of s_r exp(m_r - m)                 t = sum of t_r
    loss = log(s) + m - t          d_logits = (exp(logits - m) / s - onehot(target)) * d_loss

The backward of shard r counts from its own m_r, so its sum is s exp(m - m_r) (`cross_entropy_backward`).
Columns from `num_valid` on are padding of the vocabulary: they count as minus infinity, so their probability and
gradient are 0. A shard may have no valid column at all. A target outside every shard (an ignored position, -100 say)
has t = 0 and no onehot; the caller gives such rows the loss gradient 0.
Source: Shoeybi et al., "Megatron-LM" (2019), section 3, for the fusion of the loss with the parallel output layer;
Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), for joining sums that have maxima of their
own.

V is the last dimension, "rows" are all others. Numbers per row are fp32 (fp64 for fp64 logits). No autograd here:
the caller's autograd function is made of these pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron3d_kernels.launch import KernelError, as_rows, block_of, compute_dtype, jit, launch, row_chunks, tl
from megatron3d_kernels.selection import DEFAULT_SELECTION, Kernel, Selection

MAX_BLOCK = 4096
CHUNK_ELEMENTS = 1 << 18
"""Logits that the reference holds in fp32 at once (1 MiB): small beside any batch and inside the cache of a core."""


@dataclass(frozen=True)
class Shard:
    """Which vocabulary entries the columns of a shard are: entry `start` first, then `num_valid` in a row."""

    start: int
    num_valid: int


@dataclass(frozen=True)
class LossRows:
    """What the backward knows of each row, [R] each.

    Attributes:
        target: its entry of the whole vocabulary.
        row_max: the maximum that this shard's exponentials were counted from.
        sum_exp: the sum over all shards of exp(logit - row_max).
        target_logit: the target's logit.
        grad_loss: gradient of the row's loss.
    """

    target: torch.Tensor
    row_max: torch.Tensor
    sum_exp: torch.Tensor
    target_logit: torch.Tensor
    grad_loss: torch.Tensor


Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Maximum, sum of exponentials counted from it, and the target's logit: numbers per row of one shard."""


@dataclass(frozen=True)
class CrossEntropy:
    """One implementation, on rows: logits [R, V]; numbers per row [R].

    `sums` may overwrite the logits where its last argument says so, with what `backward` then finds in their place;
    the last argument of `backward` says whether it did, and the result is written into its first.
    """

    local_max: Callable[[torch.Tensor, int], torch.Tensor]
    sums: Callable[[torch.Tensor, torch.Tensor, Shard, bool], Sums]
    backward: Callable[[torch.Tensor, torch.Tensor, LossRows, Shard, bool], None]


@torch.no_grad()
def local_max(logits: torch.Tensor, num_valid: int, *, selection: Selection = DEFAULT_SELECTION) -> torch.Tensor:
    """Largest of the first `num_valid` logits of each row [..., V]; result [...], minus infinity if there is none."""
    _check(logits, num_valid)
    return selection.pick(CROSS_ENTROPY, logits).local_max(as_rows(logits), num_valid).view(logits.shape[:-1])


@torch.no_grad()
def local_softmax_sums(
    logits: torch.Tensor,
    target: torch.Tensor,
    vocab_start: int,
    num_valid: int,
    *,
    overwrite: bool = False,
    selection: Selection = DEFAULT_SELECTION,
) -> Sums:
    """Largest logit m of this shard's valid columns, sum of exp(logit - m) over them, and the target's logit.

    logits [..., V]; target [...] integer entries of the whole vocabulary. Result three tensors [...]: the first is a
    finite number far below all others where nothing is valid, the third is 0 where the target is elsewhere.
    With `overwrite`, contiguous logits may be replaced by what the backward needs of them; then they are
    good for nothing but `cross_entropy_backward` with `overwritten`.
    """
    _check(logits, num_valid)
    pieces = selection.pick(CROSS_ENTROPY, logits)
    shard = Shard(vocab_start, num_valid)
    overwrite = overwrite and logits.is_contiguous()  # otherwise the rows may be a copy
    max, sum_exp, target_logit = pieces.sums(as_rows(logits), _per_row(target), shard, overwrite)
    shape = logits.shape[:-1]
    return max.view(shape), sum_exp.view(shape), target_logit.view(shape)


@torch.no_grad()
def cross_entropy_backward(
    logits: torch.Tensor,
    target: torch.Tensor,
    max: torch.Tensor,
    sum_exp: torch.Tensor,
    target_logit: torch.Tensor,
    grad_loss: torch.Tensor,
    *,
    vocab_start: int,
    num_valid: int,
    in_place: bool = False,
    overwritten: bool = False,
    selection: Selection = DEFAULT_SELECTION,
) -> torch.Tensor:
    """Gradient of the loss by this shard's logits, in their dtype: (exp(logit - max) / sum_exp - onehot) * grad_loss.

    logits [..., V], or what `local_softmax_sums` left in their place if it was allowed to (`overwritten`); max [...] as
    it came from there; sum_exp [...] over all shards but counted from this max; target, target_logit (of whichever
    shard has it) and grad_loss [...]. With `in_place`, contiguous logits are overwritten and returned, which saves the
    largest tensor of a step; the caller must not need them again.
    """
    _check(logits, num_valid)
    grad = logits if in_place and logits.is_contiguous() else logits.new_empty(logits.shape)
    rows = LossRows(*(_per_row(numbers) for numbers in (target, max, sum_exp, target_logit, grad_loss)))
    pieces = selection.pick(CROSS_ENTROPY, logits)
    overwritten = overwritten and logits.is_contiguous()
    pieces.backward(as_rows(grad), as_rows(logits), rows, Shard(vocab_start, num_valid), overwritten)
    return grad


def _check(logits: torch.Tensor, num_valid: int) -> None:
    """Refuse more valid columns than there are."""
    if not 0 <= num_valid <= logits.shape[-1]:
        raise KernelError(f"num_valid is {num_valid}, but the shard has {logits.shape[-1]} columns.")


def _per_row(numbers: torch.Tensor) -> torch.Tensor:
    """One number per row [R], neighbours in memory: a gradient may come as one number seen from every row."""
    return numbers.reshape(-1).contiguous()


def _local_column(target: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each row's target, 0 where it is elsewhere, and whether it is here."""
    column = target - shard.start
    here = (column >= 0) & (column < shard.num_valid)
    return torch.where(here, column, 0), here


def _reference_local_max(logits: torch.Tensor, num_valid: int) -> torch.Tensor:
    """Plain torch; a maximum is exact in any dtype, so nothing is widened before it."""
    if num_valid == 0:
        shape = logits.shape[:1]
        return torch.full(shape, float("-inf"), dtype=compute_dtype(logits.dtype), device=logits.device)
    return logits[:, :num_valid].amax(dim=-1).to(compute_dtype(logits.dtype))


def _reference_sums(logits: torch.Tensor, target: torch.Tensor, shard: Shard, overwrite: bool) -> Sums:
    """Plain torch, some rows at a time, which stay in the cache from the maximum to the sum.

    Exponentials that are kept spare the backward a second pass of `exp`; they are rounded to the dtype of the logits,
    as the gradient is that is made of them.
    """
    dtype = compute_dtype(logits.dtype)
    row_max = torch.full(logits.shape[:1], torch.finfo(dtype).min, dtype=dtype, device=logits.device)
    sum_exp = torch.zeros_like(row_max)
    if shard.num_valid == 0:
        return row_max, sum_exp, torch.zeros_like(sum_exp)
    valid = logits[:, : shard.num_valid]
    column, here = _local_column(target, shard)
    target_logit = valid.gather(1, column[:, None]).squeeze(1).to(dtype)
    for rows in row_chunks(logits, CHUNK_ELEMENTS):
        wide = valid[rows].to(dtype)  # a maximum of narrow numbers takes longer than of widened ones
        # A row of minus infinities is counted from the lowest finite number, so that it gives zeros.
        torch.clamp(wide.amax(-1), min=torch.finfo(dtype).min, out=row_max[rows])
        is_copy = valid.dtype != dtype
        exponentials = torch.sub(wide, row_max[rows, None], out=wide if overwrite or is_copy else None).exp_()
        torch.sum(exponentials, -1, out=sum_exp[rows])
        if overwrite and is_copy:
            valid[rows] = exponentials
    return row_max, sum_exp, torch.where(here, target_logit, 0)


def _reference_backward(
    grad: torch.Tensor, logits: torch.Tensor, rows: LossRows, shard: Shard, overwritten: bool
) -> None:
    """Plain torch, some rows at a time; each chunk is read whole before it is written, so grad may be logits.

    The entry of the target, a difference of nearly equal numbers where the model is sure, is made from its logit.
    """
    grad[:, shard.num_valid :] = 0
    if shard.num_valid == 0:
        return
    dtype = compute_dtype(logits.dtype)
    column, here = _local_column(rows.target, shard)
    grad_loss = rows.grad_loss.to(dtype)
    scale = grad_loss / rows.sum_exp
    at_target = (rows.target_logit - rows.row_max).exp() * scale - grad_loss
    for some in row_chunks(logits, CHUNK_ELEMENTS):
        chunk = logits[some, : shard.num_valid]
        if not overwritten:
            chunk = (chunk - rows.row_max[some, None].to(dtype)).exp_()
        torch.mul(chunk, scale[some, None], out=grad[some, : shard.num_valid])
    # Indexed, since `scatter_` on a CPU copies a whole bf16 tensor to fp32 and back.
    place = (torch.arange(grad.shape[0], device=grad.device), column)
    grad[place] = torch.where(here, at_target.to(grad.dtype), grad[place])


def _triton_local_max(logits: torch.Tensor, num_valid: int) -> torch.Tensor:
    """One program per row."""
    num_rows = logits.shape[0]
    row_max = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    constants = {"BLOCK": block_of(num_valid, limit=MAX_BLOCK), "num_warps": 8}
    launch(_max_kernel, (num_rows,), logits, row_max, logits.stride(0), num_valid, device=logits.device, **constants)
    return row_max


def _triton_sums(logits: torch.Tensor, target: torch.Tensor, shard: Shard, overwrite: bool) -> Sums:
    """One program per row, for the maximum and again for the sum; it leaves the logits, since writing exponentials
    would cost memory traffic where arithmetic is nearly free."""
    num_rows = logits.shape[0]
    row_max = _triton_local_max(logits, shard.num_valid).clamp_(min=torch.finfo(torch.float32).min)
    sum_exp = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    target_logit = torch.empty_like(sum_exp)
    tensors = (logits, target, row_max, sum_exp, target_logit)
    sizes = (logits.stride(0), shard.start, shard.num_valid)
    constants = {"BLOCK": block_of(shard.num_valid, limit=MAX_BLOCK), "num_warps": 8}
    launch(_sum_exp_kernel, (num_rows,), *tensors, *sizes, device=logits.device, **constants)
    return row_max, sum_exp, target_logit


def _triton_backward(grad: torch.Tensor, logits: torch.Tensor, rows: LossRows, shard: Shard, overwritten: bool) -> None:
    """One program per row and block; it reads its block before it writes it, so grad may be logits."""
    num_rows, num_columns = logits.shape
    block = block_of(num_columns, limit=MAX_BLOCK)
    tensors = (logits, rows.target, rows.row_max, rows.sum_exp, rows.grad_loss, grad)
    sizes = (logits.stride(0), grad.stride(0), shard.start, shard.num_valid, num_columns)
    grid = (num_rows, -(-num_columns // block))
    launch(_backward_kernel, grid, *tensors, *sizes, device=logits.device, BLOCK=block, num_warps=8)


@jit
def _max_kernel(
    logits_ptr: tl.tensor, max_ptr: tl.tensor, stride: tl.tensor, num_valid: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Largest valid logit of one row; lanes keep their own maximum until the end."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for first in range(0, num_valid, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * stride + columns, mask=columns < num_valid, other=float("-inf"))
        largest = tl.maximum(largest, logits.to(tl.float32))
    tl.store(max_ptr + row, tl.max(largest, axis=0))


@jit
def _sum_exp_kernel(
    logits_ptr: tl.tensor,
    target_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_exp_ptr: tl.tensor,
    target_logit_ptr: tl.tensor,
    stride: tl.tensor,
    vocab_start: tl.tensor,
    num_valid: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Sum of exponentials of one row, and one more load for the target's logit where it is here."""
    row = tl.program_id(0).to(tl.int64)
    row_max = tl.load(max_ptr + row).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, num_valid, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * stride + columns, mask=columns < num_valid, other=float("-inf"))
        total += tl.exp(logits.to(tl.float32) - row_max)
    column = tl.load(target_ptr + row).to(tl.int64) - vocab_start
    here = (column >= 0) & (column < num_valid)
    target_logit = tl.load(logits_ptr + row * stride + column, mask=here, other=0.0).to(tl.float32)
    tl.store(sum_exp_ptr + row, tl.sum(total, axis=0))
    tl.store(target_logit_ptr + row, target_logit)


@jit
def _backward_kernel(
    logits_ptr: tl.tensor,
    target_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_exp_ptr: tl.tensor,
    grad_loss_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    logits_stride: tl.tensor,
    grad_stride: tl.tensor,
    vocab_start: tl.tensor,
    num_valid: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Softmax minus onehot of one block of one row; padding columns load minus infinity and so get 0."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_max = tl.load(max_ptr + row).to(tl.float32)
    grad_loss = tl.load(grad_loss_ptr + row).to(tl.float32)
    scale = grad_loss / tl.load(sum_exp_ptr + row).to(tl.float32)
    valid = columns < num_valid
    logits = tl.load(logits_ptr + row * logits_stride + columns, mask=valid, other=float("-inf"))
    grad = tl.exp(logits.to(tl.float32) - row_max) * scale
    column = tl.load(target_ptr + row).to(tl.int64) - vocab_start
    grad = tl.where(columns == column, grad - grad_loss, grad)
    grad = tl.where(valid, grad, 0.0).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + row * grad_stride + columns, grad, mask=columns < num_columns)


CROSS_ENTROPY = Kernel(
    name="cross_entropy",
    reference=CrossEntropy(
        local_max=_reference_local_max,
        sums=_reference_sums,
        backward=_reference_backward,
    ),
    triton=CrossEntropy(
        local_max=_triton_local_max,
        sums=_triton_sums,
        backward=_triton_backward,
    ),
)
