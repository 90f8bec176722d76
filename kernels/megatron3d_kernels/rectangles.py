"""Attention over rectangles of the scores: packed documents, a sequence cut over ranks and the steps of a ring, without
a mask of the size of the scores.

A rectangle is a range of queries and a range of keys that meet fully, or causally if it is a square: query i of it
attends to keys 0 to i of it. A query may stand in several rectangles. Their softmaxes are merged by the logarithms L of
the sums of exponentials, in fp32:

    L = log(exp(L1) + exp(L2))      o = o1 exp(L1 - L) + o2 exp(L2 - L)

A query in none gets zeros and L = -inf. The backward of each rectangle takes the merged output and L, from which the
true probabilities of its scores follow. So the halves `forward` and `backward` serve a ring too, where the rectangles
of a query are computed at different times.

Each rectangle is one call of the library's fused kernel (`rectangle_ops.py`) on views. Small causal squares that follow
each other, as short documents do, share a call with a mask of at most ROWS_TOGETHER rows.

Source: Dao et al. 2022 (FlashAttention, arXiv:2205.14135), appendix B; Liu et al. 2023 (Ring Attention,
arXiv:2310.01889) for the merging across devices.

Shapes: B micro-batch, N query heads, G key and value heads, S queries, T keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron3d_kernels import rectangle_ops as ops
from megatron3d_kernels.launch import KernelError, sent

ROWS_TOGETHER = 64
"""Most queries of a call that small causal squares share."""


@dataclass(frozen=True)
class Rectangle:
    """The scores of neighbouring queries with neighbouring keys of one sample: all of them, or, if `is_causal`, those
    of query i of the range with keys 0 to i of theirs. Ranges have step 1.

    Raises KernelError for a causal rectangle that is no square.
    """

    queries: range
    keys: range
    is_causal: bool

    def __post_init__(self) -> None:
        if self.is_causal and len(self.queries) != len(self.keys):
            raise KernelError(
                f"a causal rectangle has {len(self.queries)} queries and {len(self.keys)} keys, which must be as many; "
                "cut it into a full rectangle and a causal square"
            )


Plan = Sequence[Sequence[Rectangle]]
"""The rectangles of each sample of a micro-batch, or, with one entry, those of every sample. No score stands in two."""


def rectangle_attention(q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, plan: Plan) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the scores in the plan's rectangles, [B, N, S, D] in the dtype of q.

    Each key and value head serves N / G neighbouring query heads. Keeps q, k, v, the output and one number a query and
    head for the backward. Raises KernelError where the plan is of another number of samples.
    """
    return _RectangleAttention.apply(q_BNSD, k_BGTD, v_BGTD, plan)


def forward(q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The same without autograd, and L [B, N, S] in fp32 (fp64 if q is). Raises as `rectangle_attention`."""
    calls = _calls_of_samples(plan, len(q_BNSD))
    wide = torch.promote_types(q_BNSD.dtype, torch.float32)
    merges = any(call.repeats_queries for _, call in calls)
    out_BNSD = torch.zeros_like(q_BNSD, dtype=wide if merges else q_BNSD.dtype)
    log_sum_BNS = torch.full(q_BNSD.shape[:3], -inf, dtype=wide, device=q_BNSD.device)
    for samples, call in calls:
        mine, others = (samples, slice(None), call.queries), (samples, slice(None), call.keys)
        rows = (q_BNSD[mine], k_BGTD[others], v_BGTD[others])
        y_BNRD, of_call_BNR = ops.forward(*rows, is_causal=call.is_causal, mask=call.mask(rows[0]))
        if call.repeats_queries:
            merge_(out_BNSD[mine], log_sum_BNS[mine], y_BNRD, of_call_BNR)
        else:
            out_BNSD[mine], log_sum_BNS[mine] = y_BNRD, of_call_BNR
    return out_BNSD.to(q_BNSD.dtype), log_sum_BNS


def backward(
    grad_BNSD: Tensor,
    q_BNSD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    out_BNSD: Tensor,
    log_sum_BNS: Tensor,
    *,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by the scores in the plan's rectangles, in their dtypes; sums are in fp32.

    `out_BNSD` and `log_sum_BNS` are those of all scores of a query, also of such as other plans hold. Raises as
    `rectangle_attention`.
    """
    calls = _calls_of_samples(plan, len(q_BNSD))
    wide = torch.promote_types(q_BNSD.dtype, torch.float32)
    sums_queries = any(call.repeats_queries for _, call in calls)
    sums_keys = any(call.repeats_keys for _, call in calls)
    dq_BNSD = torch.zeros_like(q_BNSD, dtype=wide if sums_queries else q_BNSD.dtype)
    dk_BGTD, dv_BGTD = (torch.zeros_like(x, dtype=wide if sums_keys else x.dtype) for x in (k_BGTD, v_BGTD))
    for samples, call in calls:
        mine, others = (samples, slice(None), call.queries), (samples, slice(None), call.keys)
        rows = (grad_BNSD[mine], q_BNSD[mine], k_BGTD[others], v_BGTD[others], out_BNSD[mine], log_sum_BNS[mine])
        found = ops.backward(*rows, is_causal=call.is_causal, mask=call.mask(rows[1]))
        _put(dq_BNSD[mine], found[0], adds=call.repeats_queries)
        _put(dk_BGTD[others], found[1], adds=call.repeats_keys)
        _put(dv_BGTD[others], found[2], adds=call.repeats_keys)
    return dq_BNSD.to(q_BNSD.dtype), dk_BGTD.to(k_BGTD.dtype), dv_BGTD.to(v_BGTD.dtype)


def merge_(out_BNSD: Tensor, log_sum_BNS: Tensor, other_BNSD: Tensor, other_log_sum_BNS: Tensor) -> None:
    """Merge the output and L of further scores of the same queries into the first two, which are fp32 (or fp64)."""
    merged_BNS = torch.logaddexp(log_sum_BNS, other_log_sum_BNS)
    reference_BNS = merged_BNS.masked_fill(merged_BNS == -inf, 0.0)  # a query without scores stays 0, not nan
    out_BNSD.mul_((log_sum_BNS - reference_BNS).exp_().unsqueeze(-1))
    out_BNSD.add_((other_log_sum_BNS - reference_BNS).exp_().unsqueeze(-1) * other_BNSD)
    log_sum_BNS.copy_(merged_BNS)


def reference(q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, plan: Plan) -> Tensor:
    """`rectangle_attention` in plain torch with every score written out, for any device and dtype."""
    heads, keys = q_BNSD.shape[1], k_BGTD.shape[2]
    k_BNTD, v_BNTD = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_BGTD, v_BGTD))
    sees_BST = torch.zeros(len(q_BNSD), q_BNSD.shape[2], keys, dtype=torch.bool, device=q_BNSD.device)
    for sample, sees_ST in enumerate(sees_BST):
        for rectangle in plan[sample if len(plan) > 1 else 0]:
            scores = torch.ones_like(sees_ST[_rows(rectangle.queries), _rows(rectangle.keys)])
            sees_ST[_rows(rectangle.queries), _rows(rectangle.keys)] = scores.tril() if rectangle.is_causal else scores
    sees_B1ST = sees_BST.unsqueeze(1)
    scores_BNST = (q_BNSD @ k_BNTD.transpose(-2, -1) / sqrt(q_BNSD.shape[-1])).masked_fill(~sees_B1ST, -inf)
    weights_BNST = scores_BNST.masked_fill(~sees_B1ST.any(-1, keepdim=True), 0.0).softmax(-1) * sees_B1ST
    return weights_BNST @ v_BNTD


class _RectangleAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, plan: Plan) -> Tensor:
        out_BNSD, log_sum_BNS = forward(q_BNSD, k_BGTD, v_BGTD, plan)
        ctx.save_for_backward(q_BNSD, k_BGTD, v_BGTD, out_BNSD, log_sum_BNS)
        ctx.plan = plan
        return out_BNSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNSD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *backward(grad_BNSD, *ctx.saved_tensors, plan=ctx.plan), None


@dataclass(frozen=True)
class _Call:
    """One call of the library: a rectangle, or small causal squares of `lengths` that follow each other.

    `repeats_queries` and `repeats_keys`: whether an earlier call of the plan has some of its queries or keys.
    """

    queries: slice
    keys: slice
    is_causal: bool
    lengths: tuple[int, ...]
    repeats_queries: bool
    repeats_keys: bool

    def mask(self, q_BNRD: Tensor) -> Tensor | None:
        """[R, R] in the dtype of q: 0 where a query attends, -inf elsewhere; None without squares to separate."""
        if not self.lengths:
            return None
        device = q_BNRD.device
        lengths = sent(torch.tensor(self.lengths), device)
        square_R = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=q_BNRD.shape[2])
        sees_RR = (square_R.unsqueeze(1) == square_R).tril_()
        return torch.zeros(sees_RR.shape, dtype=q_BNRD.dtype, device=device).masked_fill_(~sees_RR, -inf)


def _calls_of_samples(plan: Plan, samples: int) -> list[tuple[slice, _Call]]:
    """The calls of a plan, each with the samples it is for: all at once where they have the same rectangles."""
    if len(plan) not in (1, samples):
        raise KernelError(f"a plan for {len(plan)} samples was given with tensors of {samples}; give 1 or {samples}")
    if all(rectangles == plan[0] for rectangles in plan[1:]):
        return [(slice(None), call) for call in _calls(plan[0])]
    each = enumerate(plan)
    return [(slice(sample, sample + 1), call) for sample, rectangles in each for call in _calls(rectangles)]


def _calls(rectangles: Sequence[Rectangle]) -> Iterator[_Call]:
    queries_before = bytearray(max((rectangle.queries.stop for rectangle in rectangles), default=0))
    keys_before = bytearray(max((rectangle.keys.stop for rectangle in rectangles), default=0))
    for some in _together(rectangles):
        queries = slice(some[0].queries.start, some[-1].queries.stop)
        keys = slice(some[0].keys.start, some[-1].keys.stop)
        lengths = tuple(len(square.queries) for square in some) if len(some) > 1 else ()
        repeats = [1 in before[rows] for before, rows in ((queries_before, queries), (keys_before, keys))]
        yield _Call(queries, keys, some[0].is_causal and not lengths, lengths, *repeats)
        for before, rows in ((queries_before, queries), (keys_before, keys)):
            before[rows] = b"\1" * (rows.stop - rows.start)


def _together(rectangles: Sequence[Rectangle]) -> Iterator[list[Rectangle]]:
    """Rectangles that share a call, without the empty ones."""
    some: list[Rectangle] = []
    for rectangle in rectangles:
        if not rectangle.queries or not rectangle.keys:
            continue
        if some and not _follows(some, rectangle):
            yield some
            some = []
        some.append(rectangle)
    if some:
        yield some


def _follows(some: list[Rectangle], square: Rectangle) -> bool:
    last = some[-1]
    follows = last.queries.stop == square.queries.start and last.keys.stop == square.keys.start
    small = square.queries.stop - some[0].queries.start <= ROWS_TOGETHER
    return follows and small and last.is_causal and square.is_causal


def _rows(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def _put(sum_BNRD: Tensor, part_BNRD: Tensor, *, adds: bool) -> None:
    if adds:
        sum_BNRD.add_(part_BNRD)
    else:
        sum_BNRD.copy_(part_BNRD)
