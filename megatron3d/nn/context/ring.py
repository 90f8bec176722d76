"""Ring attention: queries stay, keys and values pass round the ranks, and what each gives is merged by log-sum-exp.

Every rank has queries, keys and values of its own positions. At step i it attends to the keys of the rank i places
before it, while these are already on their way to the next rank:

    start sending the present keys on; attend to them; wait for those that arrive

With o_i and L_i the output and log-sum-exp of step i, the result is o = sum_i exp(L_i - L) o_i with L = log sum_i
exp(L_i), in fp32. The backward gives each step the whole o and L, from which its probabilities follow: exp(q k^T - L).
Keys and values pass round once more. The gradients of those that a rank has attended to follow one step behind, in
fp32: each rank adds its own, and the last hop brings them to the rank that the keys belong to. What a rank's own
queries give to its own keys stays there.

With n = 2 B G S D elements of keys and values on each of R ranks, a layer sends (R - 1) n in the forward, and in the
backward (R - 1) n and as many in fp32. Besides a rank's own there are two buffers of keys and values, and in the
backward three of their gradients.

Source: Liu et al. 2023 (Ring Attention, arXiv:2310.01889); Zhu 2024 (ring-flash-attention) for the backward from the
whole output.

Shapes: B micro-batch, N query heads, G key and value heads, S positions of this rank, D head size. The pair of keys and
values is [2, B, G, S, D].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from megatron3d_kernels import rectangles
from megatron3d_kernels.rectangles import Plan
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron3d.comm.mesh import Axis
from megatron3d.comm.replay import Replay
from megatron3d.comm.ring import Hop, start_hop

_KEYS, _GRADIENTS = 0, 1  # tags of the two streams of messages that a backward has under way at once


def ring_attention(q_BNSD: Tensor, kv_2BGSD: Tensor, plans: Sequence[Plan], ring: Axis, *, replay: Replay) -> Tensor:
    """[B, N, S, D] in the dtype of the queries; zeros for a query that attends to nothing.

    Args:
        q_BNSD: queries of this rank's positions.
        kv_2BGSD: keys and values of this rank's positions, contiguous.
        plans: for each rank of the ring, which of this rank's queries attend to which of that rank's keys.
        ring: the ranks that have the other positions.
        replay: keeps the result for a recomputation, which then neither sends nor attends.
    """
    return _RingAttention.apply(q_BNSD, kv_2BGSD, plans, ring, replay)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BNSD: Tensor, kv_2BGSD: Tensor, plans: Sequence[Plan], ring: Axis, replay: Replay
    ) -> Tensor:
        out_BNSD, log_sum_BNS = replay.run(lambda: _forward(q_BNSD, kv_2BGSD, plans, ring))
        ctx.save_for_backward(q_BNSD, kv_2BGSD, out_BNSD, log_sum_BNS)
        ctx.plans, ctx.ring = plans, ring
        return out_BNSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNSD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        q_BNSD, kv_2BGSD, out_BNSD, log_sum_BNS = ctx.saved_tensors
        queries = _Queries(q_BNSD, out_BNSD, log_sum_BNS, grad_BNSD)
        dq_BNSD, dkv_2BGSD = _backward(queries, kv_2BGSD, ctx.plans, ctx.ring)
        return dq_BNSD.to(q_BNSD.dtype), dkv_2BGSD.to(kv_2BGSD.dtype), None, None, None


def _arrivals(own_2BGSD: Tensor, plans: Sequence[Plan], ring: Axis) -> Iterator[tuple[Tensor, Plan]]:
    """Keys and values of every rank, this rank's first, each with what attends to them here. While the caller works
    with some, they are on their way to the next rank, and others on their way here."""
    present, spare = own_2BGSD, [torch.empty_like(own_2BGSD) for _ in range(min(2, ring.size - 1))]
    for step in range(ring.size):
        hop = start_hop(present, spare[step % 2], ring, tag=_KEYS) if step + 1 < ring.size else None
        yield present, plans[(ring.rank - step) % ring.size]
        if hop is not None:
            present = hop.wait()


def _forward(q_BNSD: Tensor, own_2BGSD: Tensor, plans: Sequence[Plan], ring: Axis) -> tuple[Tensor, Tensor]:
    """Output, in the dtype of the queries, and log-sum-exp over the keys of all ranks."""
    merged: tuple[Tensor, Tensor] | None = None
    for (k_BGSD, v_BGSD), plan in _arrivals(own_2BGSD, plans, ring):
        if any(plan):
            found = rectangles.forward(q_BNSD, k_BGSD, v_BGSD, plan)
            merged = found if merged is None else _merged(merged, found)
    if merged is None:  # no rank has a key for these queries
        return torch.zeros_like(q_BNSD), q_BNSD.new_full(q_BNSD.shape[:3], -inf, dtype=_wide(q_BNSD))
    return merged[0].to(q_BNSD.dtype), merged[1]


def _merged(so_far: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output, fp32 or wider, and log-sum-exp over the keys of two steps; takes the storage of the first."""
    out_BNSD, log_sum_BNS = so_far[0].to(so_far[1].dtype), so_far[1]
    rectangles.merge_(out_BNSD, log_sum_BNS, *found)
    return out_BNSD, log_sum_BNS


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of sums over steps: fp32, or fp64 where that is what is added."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class _Queries:
    """What all steps of a backward have in common: the queries, their output and log-sum-exp over the keys of all
    ranks, and the gradient of that output."""

    q_BNSD: Tensor
    out_BNSD: Tensor
    log_sum_BNS: Tensor
    grad_BNSD: Tensor

    def backward(self, kv_2BGSD: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the queries, and of these keys and values."""
        k_BGSD, v_BGSD = kv_2BGSD
        saved = (self.out_BNSD, self.log_sum_BNS)
        return rectangles.backward(self.grad_BNSD, self.q_BNSD, k_BGSD, v_BGSD, *saved, plan=plan)


def _backward(queries: _Queries, own_2BGSD: Tensor, plans: Sequence[Plan], ring: Axis) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of this rank's keys and values, in fp32."""
    dq_BNSD: Tensor | None = None
    gradients = _KeyGradients(own_2BGSD, ring)
    for kv_2BGSD, plan in _arrivals(own_2BGSD, plans, ring):
        of_keys: Sequence[Tensor] = ()
        if any(plan):
            of_queries_BNSD, *of_keys = queries.backward(kv_2BGSD, plan)
            dq_BNSD = of_queries_BNSD if dq_BNSD is None else dq_BNSD.to(_wide(dq_BNSD)).add_(of_queries_BNSD)
        if kv_2BGSD is own_2BGSD:
            gradients.add_own(of_keys)
        else:
            gradients.add_and_pass(of_keys)
    return torch.zeros_like(queries.q_BNSD) if dq_BNSD is None else dq_BNSD, gradients.summed()


class _KeyGradients:
    """Gradients of keys and values, in fp32: those of this rank's own, and those that pass round with other keys."""

    def __init__(self, own_2BGSD: Tensor, ring: Axis) -> None:
        self._ring = ring
        self._own = torch.zeros_like(own_2BGSD, dtype=_wide(own_2BGSD))
        self._spare = [torch.empty_like(self._own) for _ in range(min(2, 2 * (ring.size - 1)))]
        self._hop: Hop | None = None

    def add_own(self, of_keys: Sequence[Tensor]) -> None:
        """Add what this rank's queries give to its own keys and values."""
        _add(self._own, of_keys)

    def add_and_pass(self, of_keys: Sequence[Tensor]) -> None:
        """Add what this rank's queries give to the present keys to what earlier ranks' gave, and pass it on."""
        leaving, arriving = self._spare
        if self._hop is None:
            leaving.zero_()
        else:
            self._hop.wait()
            leaving, arriving = arriving, leaving
        _add(leaving, of_keys)
        self._hop = start_hop(leaving, arriving, self._ring, tag=_GRADIENTS)
        self._spare = [leaving, arriving]

    def summed(self) -> Tensor:
        """The gradients of this rank's keys and values, once all ranks' queries have attended to them."""
        return self._own if self._hop is None else self._own.add_(self._hop.wait())


def _add(total_2BGSD: Tensor, of_keys: Sequence[Tensor]) -> None:
    """Add the gradients of keys and of values, unless there are none."""
    for total_BGSD, gradient_BGSD in zip(total_2BGSD, of_keys):
        total_BGSD += gradient_BGSD
