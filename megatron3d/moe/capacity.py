"""Expert capacity: the most tokens of a sequence that one expert takes, and which are dropped when more choose it.

    C = ceil(K S / E x factor)        of each sequence of S tokens and each of E experts, K choices of a token

Of the tokens of a sequence that choose an expert, the C first are kept (--moe-token-drop-policy): those of largest
weight, and of equal ones the earlier; or simply the earlier; or, in training, those of the largest random numbers. A
choice that is dropped adds nothing to its token. Since each
sequence has a capacity of its own, what is dropped depends neither on the layout nor on what else is in the batch; the
tensor- and context-parallel ranks, which have parts of a sequence, exchange choices and weights.

Source: Lepikhin et al. 2020 (GShard), section 2.2, where a group of tokens is what one device has; Kim et al. 2021
(arXiv:2109.10465) for random selection.

Shapes: T tokens of this rank, K choices, N choices of all ranks that have tokens of the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron3d.comm.collectives import all_gather, own_part
from megatron3d.comm.mesh import Axis
from megatron3d.config.sections.model import ModelConfig


def capacity_of(config: ModelConfig, num_experts: int, length: int) -> int | None:
    """Tokens of a sequence of this length that one of a layer's experts takes; None where it takes all."""
    factor = config.moe_expert_capacity_factor
    if factor is None:
        return None
    needed = min(length, config.moe_router_topk * length / num_experts * factor)
    return min(length, max(math.ceil(needed), config.moe_min_capacity))  # no expert has more tokens to take


def kept_choices(
    expert_TK: Tensor,
    priority_TK: Tensor | None,
    sample_T: Tensor,
    *,
    capacity: int,
    num_experts: int,
    tp: Axis,
    cp: Axis | None = None,
    position_T: Tensor | None = None,
) -> Tensor:
    """Which choices are kept, bool [T, K].

    Args:
        expert_TK: chosen experts, int64; those of -1 are none and are not kept.
        priority_TK: what is larger goes first; None where the earlier token does.
        sample_T: the sample of each token, int64; tokens stand position by position, and those of a rank of `tp` before
            those of the next.
        capacity: tokens of a sample that an expert takes.
        num_experts: E.
        tp: the ranks that have the other tokens of these samples.
        cp: further ones, where `position_T` is given.
        position_T: where each token stands in its sample, int64, where ranks do not have them in order.
    """
    group = torch.where(expert_TK < 0, -1, sample_T.unsqueeze(1) * num_experts + expert_TK)
    axes = [tp] if cp is None or position_T is None else [tp, cp]
    group_N = _of_all(group, axes).flatten()
    order_N = torch.arange(len(group_N), device=group_N.device)
    if position_T is not None:
        order_N = _of_all(position_T.unsqueeze(1).expand_as(expert_TK), axes).flatten().argsort(stable=True)
    if priority_TK is not None:
        priority_N = _of_all(priority_TK, axes).flatten()
        order_N = order_N[priority_N[order_N].argsort(descending=True, stable=True)]
    order_N = order_N[group_N[order_N].argsort(stable=True)]
    sorted_N = group_N[order_N]
    first_N = torch.searchsorted(sorted_N, sorted_N)  # where the group of each begins
    rank_N = torch.arange(len(sorted_N), device=group_N.device) - first_N
    kept_N = torch.empty_like(sorted_N, dtype=torch.bool)
    kept_N[order_N] = (rank_N < capacity) & (sorted_N >= 0)
    kept_TK = kept_N.view(-1, expert_TK.shape[1])
    for axis in reversed(axes):
        kept_TK = own_part(kept_TK, axis)
    return kept_TK


def _of_all(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """What the ranks of all these axes have, along the first dim."""
    for axis in axes:
        x = all_gather(x, axis)
    return x
