"""From positions to heads and back: every rank gets some heads of all positions of a group of ranks.

Before the exchange a rank has all heads of its own positions; after it, 1 / A of the query heads, and the key and value
heads that these read, of the positions of all A ranks of the group, in ascending order. With fewer key and value heads
than ranks, neighbouring ranks get copies of one, whose gradients are summed on the way back. Queries, keys and values
go in one all-to-all; the output comes back in another; the backward has the same two.

With s positions on each rank and g = max(G / A, 1), a layer and rank receives B A s (N / A + 2 g) D elements there and
B s N D back, 1 / A of them its own; as many in the backward.

Source: Jacobs et al. 2023 (DeepSpeed-Ulysses, arXiv:2309.14509).

Shapes: A ranks of the group, B micro-batch, N query heads, G key and value heads, n and g those of one rank after the
exchange, s positions of a rank, S = A s positions of the group, D head size. An order is int64 [1 or B, A, s]: for each
sample (or all) and rank of the group, where its positions stand among those of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron3d.comm import collectives
from megatron3d.comm.mesh import Axis
from megatron3d.comm.replay import Replay


def to_heads(
    q_BNsD: Tensor, k_BGsD: Tensor, v_BGsD: Tensor, order_BAs: Tensor, heads: Axis, *, replay: Replay
) -> tuple[Tensor, Tensor]:
    """This rank's heads at all positions of the group: queries [B, n, S, D], and keys and values [2, B, g, S, D].

    N divides by the ranks of `heads`, and of G and these ranks one divides the other.
    """
    if heads.size == 1:
        # Queries lie in one tensor with keys and values, which would be kept with them.
        return q_BNsD.clone(), torch.stack((k_BGsD, v_BGsD))
    return _ToHeads.apply(q_BNsD, k_BGsD, v_BGsD, order_BAs, heads, replay)


def to_positions(y_BnSD: Tensor, order_BAs: Tensor, heads: Axis, *, replay: Replay) -> Tensor:
    """All heads at this rank's positions, [B, N, s, D]."""
    return y_BnSD if heads.size == 1 else _ToPositions.apply(y_BnSD, order_BAs, heads, replay)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BNsD: Tensor, k_BGsD: Tensor, v_BGsD: Tensor, order_BAs: Tensor, heads: Axis, replay: Replay
    ) -> tuple[Tensor, Tensor]:
        ranks = heads.size
        ctx.order_BAs, ctx.heads, ctx.num_groups = order_BAs, heads, k_BGsD.shape[1]
        copies = max(1, ranks // k_BGsD.shape[1])
        parts = [_by_rank(q_BNsD, ranks), *(_by_rank(_copied(x, copies), ranks) for x in (k_BGsD, v_BGsD))]
        ctx.sizes = [part.shape[2] for part in parts]
        leaving_ABhsD = torch.cat(parts, dim=2)
        arrived_ABhsD = replay.run(lambda: _exchange(leaving_ABhsD, heads))
        q_ABnsD, k_ABgsD, v_ABgsD = arrived_ABhsD.split(ctx.sizes, dim=2)
        kv_2BgSD = torch.stack([_joined(x, order_BAs) for x in (k_ABgsD, v_ABgsD)])
        return _joined(q_ABnsD, order_BAs), kv_2BgSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BnSD: Tensor, dkv_2BgSD: Tensor) -> tuple[Tensor | None, ...]:
        parts = [_taken_apart(x, ctx.order_BAs) for x in (dq_BnSD, *dkv_2BgSD)]
        dq_ABnsD, *of_keys = _exchange(torch.cat(parts, dim=2), ctx.heads).split(ctx.sizes, dim=2)
        dk_BGsD, dv_BGsD = (_summed(_of_all_ranks(x), ctx.num_groups) for x in of_keys)
        return _of_all_ranks(dq_ABnsD), dk_BGsD, dv_BGsD, None, None, None


class _ToPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BnSD: Tensor, order_BAs: Tensor, heads: Axis, replay: Replay) -> Tensor:
        ctx.order_BAs, ctx.heads = order_BAs, heads
        return _of_all_ranks(replay.run(lambda: _exchange(_taken_apart(y_BnSD, order_BAs), heads)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNsD: Tensor) -> tuple[Tensor, None, None, None]:
        leaving_ABnsD = _by_rank(grad_BNsD, ctx.heads.size).contiguous()
        return _joined(_exchange(leaving_ABnsD, ctx.heads), ctx.order_BAs), None, None, None


def _exchange(leaving_ABhsD: Tensor, heads: Axis) -> Tensor:
    """Send each rank of the group its part, and get one from each, in rank order."""
    each = [leaving_ABhsD[0].numel()] * heads.size
    arrived = collectives.all_to_all(leaving_ABhsD.view(-1), heads, send=each, receive=each)
    return arrived.view(leaving_ABhsD.shape)


def _by_rank(x_BNsD: Tensor, ranks: int) -> Tensor:
    """[A, B, n, s, D]: the heads of each rank."""
    return x_BNsD.unflatten(1, (ranks, -1)).transpose(0, 1)


def _of_all_ranks(x_ABnsD: Tensor) -> Tensor:
    """[B, N, s, D]: the heads of all ranks side by side."""
    return x_ABnsD.transpose(0, 1).flatten(1, 2)


def _copied(x_BGsD: Tensor, copies: int) -> Tensor:
    """[B, G * copies, s, D]: each head as often as ranks need it."""
    return x_BGsD if copies == 1 else x_BGsD.repeat_interleave(copies, dim=1)


def _summed(x_BGsD: Tensor, num_groups: int) -> Tensor:
    """[B, G, s, D]: the gradients of the copies of each head summed (in fp32, as torch's sums of narrow dtypes are)."""
    return x_BGsD if x_BGsD.shape[1] == num_groups else x_BGsD.unflatten(1, (num_groups, -1)).sum(2)


def _joined(x_AbnsD: Tensor, order_BAs: Tensor) -> Tensor:
    """[B, n, S, D]: the positions of all ranks of the group in ascending order."""
    ranks, samples, heads, length, size = x_AbnsD.shape
    joined_BnSD = x_AbnsD.new_empty(samples, heads, ranks * length, size)
    for of_samples, order_As in _orders(order_BAs):
        for x_bnsD, order_s in zip(x_AbnsD[:, of_samples], order_As):
            joined_BnSD[of_samples].index_copy_(2, order_s, x_bnsD)
    return joined_BnSD


def _taken_apart(x_BnSD: Tensor, order_BAs: Tensor) -> Tensor:
    """[A, B, n, s, D]: what stands at the positions of each rank of the group."""
    samples, heads, _, size = x_BnSD.shape
    ranks, length = order_BAs.shape[1:]
    parts_ABnsD = x_BnSD.new_empty(ranks, samples, heads, length, size)
    for of_samples, order_As in _orders(order_BAs):
        for part_bnsD, order_s in zip(parts_ABnsD[:, of_samples], order_As):
            part_bnsD.copy_(x_BnSD[of_samples].index_select(2, order_s))
    return parts_ABnsD


def _orders(order_BAs: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The samples that have an order in common, with it."""
    if len(order_BAs) == 1:
        yield slice(None), order_BAs[0]
    else:
        yield from ((slice(sample, sample + 1), order_As) for sample, order_As in enumerate(order_BAs))
