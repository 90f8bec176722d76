"""Attention over gathered keys: every rank gets the keys and values of all, in the order of the sample.

A row's softmax is then that of one process. The backward sums the gradients of keys and values over the ranks and
gives each those of its own; before that it gathers keys and values again, where they were not kept.

    bytes of a layer, of rank R-1/R x 2 B G S D elements: a gather in the forward, a reduce-scatter in the backward, and
    one more gather where keys and values are not kept

Source: Dubey et al. 2024 (Llama 3, arXiv:2407.21783), section 3.3.2.

Shapes: B micro-batch, N query heads, G key and value heads (N and G are this rank's), S positions of a sample, L of
this rank, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron3d_kernels import rectangles
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron3d.comm import collectives
from megatron3d.nn.context.shards import ContextShards
from megatron3d.nn.inputs import LayerInputs
from megatron3d.tensor.context import LayerContext


@dataclass(frozen=True)
class AllGatherAttention:
    """The kind `allgather` of a layer.

    Attributes:
        context: of the layer.
    """

    context: LayerContext

    def __call__(self, q_BNLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, inputs: LayerInputs) -> Tensor:
        """[B, N, L, D]."""
        assert inputs.shards is not None, "samples that are cut come with their shards"
        return _GatheredAttention.apply(q_BNLD, k_BGLD, v_BGLD, self.context, inputs.shards)


class _GatheredAttention(torch.autograd.Function):
    """Keeps queries, output and one number a query and head, and keys and values of all ranks or of this one."""

    @staticmethod
    def forward(
        ctx: Any, q_BNLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, context: LayerContext, shards: ContextShards
    ) -> Tensor:
        gathered_SKBGD = context.replay.run(lambda: _gathered(_joined(k_BGLD, v_BGLD), context, shards))
        k_BGSD, v_BGSD = _keys_and_values(gathered_SKBGD)
        y_BNLD, log_sum_BNL = rectangles.forward(q_BNLD, k_BGSD, v_BGSD, shards.plan_of_gathered)
        # Queries, keys and values lie in one tensor, so that to keep one of them by itself takes a copy.
        if context.exchange.gathers_again:
            kept: tuple[Tensor, ...] = (q_BNLD, k_BGLD, v_BGLD)
        else:
            kept = (q_BNLD.clone(), gathered_SKBGD)
        ctx.save_for_backward(y_BNLD, log_sum_BNL, *kept)
        ctx.context, ctx.shards = context, shards
        return y_BNLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNLD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        y_BNLD, log_sum_BNL, q_BNLD, *kept = ctx.saved_tensors
        context: LayerContext = ctx.context
        shards: ContextShards = ctx.shards
        # What has the length of whole samples goes as soon as it was used, so that never more than three such tensors
        # of keys and values, or their gradients, are there at once.
        if context.exchange.gathers_again:
            k_BGSD, v_BGSD = _keys_and_values(_gathered(_joined(*kept), context, shards))
        else:
            k_BGSD, v_BGSD = _keys_and_values(*kept)
        of_scores = (grad_BNLD, q_BNLD, k_BGSD, v_BGSD, y_BNLD, log_sum_BNL)
        dq_BNLD, *of_keys = rectangles.backward(*of_scores, plan=shards.plan_of_gathered)
        del k_BGSD, v_BGSD, of_scores
        dk_BGLD, dv_BGLD = _scattered(of_keys, context, shards)
        return dq_BNLD, dk_BGLD, dv_BGLD, None, None


def gathered_keys(
    k_BGLD: Tensor, v_BGLD: Tensor, context: LayerContext, shards: ContextShards
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, D] of all ranks, in the order of the sample, without gradients."""
    return _keys_and_values(_gathered(_joined(k_BGLD, v_BGLD), context, shards))


def _joined(k_BGLD: Tensor, v_BGLD: Tensor) -> Tensor:
    """Keys and values as they are sent, [L, K, B, G, D]."""
    return torch.stack((k_BGLD, v_BGLD)).movedim(3, 0).contiguous()


def _keys_and_values(both_SKBGD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, [B, G, S, D] each."""
    k_BGSD, v_BGSD = both_SKBGD.permute(1, 2, 3, 0, 4)
    return k_BGSD, v_BGSD


def _gathered(own_LKBGD: Tensor, context: LayerContext, shards: ContextShards) -> Tensor:
    """What all ranks have, [S, K, B, G, D] in the order of the sample (K = 2, keys and values)."""
    by_rank_SKBGD = collectives.all_gather(own_LKBGD, context.cp)
    places_BS = shards.places_BS
    if len(places_BS) == 1:
        return by_rank_SKBGD.index_select(0, places_BS[0])
    return by_rank_SKBGD.gather(0, _of_samples(places_BS, by_rank_SKBGD))


def _scattered(gradients: list[Tensor], context: LayerContext, shards: ContextShards) -> tuple[Tensor, Tensor]:
    """The sum over the ranks of the gradients of this rank's keys and values, [B, G, L, D] each, from those of all
    positions, [B, G, S, D] each, which are taken out of the list."""
    places_BS, (samples, groups, length, size) = shards.places_BS, gradients[0].shape
    by_rank_SKBGD = gradients[0].new_empty(length, len(gradients), samples, groups, size)
    for of_rank_SBGD in reversed(by_rank_SKBGD.unbind(1)):
        grad_SBGD = gradients.pop().permute(2, 0, 1, 3)
        if len(places_BS) == 1:
            of_rank_SBGD.index_copy_(0, places_BS[0], grad_SBGD)
        else:
            of_rank_SBGD.scatter_(0, places_BS.t()[:, :, None, None].expand_as(grad_SBGD), grad_SBGD)
    return _keys_and_values(collectives.reduce_scatter(by_rank_SKBGD, context.cp))


def _of_samples(places_BS: Tensor, like_SKBGD: Tensor) -> Tensor:
    """Places as an index of every element."""
    return places_BS.t()[:, None, :, None, None].expand_as(like_SKBGD)
