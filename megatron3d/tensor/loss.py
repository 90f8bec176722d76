"""Cross-entropy over logits whose vocabulary is cut over the tensor axis, without ever gathering them.

Per token, with m the largest logit, z_i the logits and t the target: loss = log(sum_i exp(z_i - m)) - (z_t - m).
Three numbers a token and rank cross the axis: the largest logit of its columns, the sum of exponentials counted from
that, and z_t. Vocabulary padding counts as a logit of minus infinity, so the loss does not depend on how much padding
a layout needs.

Source: Shoeybi et al. 2019, section 3 (communicating scalar losses instead of logits).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron3d_kernels.registry import Registry
from torch import Tensor

from megatron3d.comm.collectives import all_gather, all_reduce
from megatron3d.comm.mesh import Axis


class _VocabParallelLoss(torch.autograd.Function):
    """Loss per token; the backward, softmax minus one-hot, is local."""

    @staticmethod
    def forward(
        ctx: Any, logits_SBV: Tensor, target_SB: Tensor, axis: Axis, shard: tuple[int, int], kernels: Registry
    ) -> Tensor:
        ctx.overwritten = ctx.needs_input_grad[0]
        own = kernels.local_softmax_sums(logits_SBV, target_SB, *shard, overwrite=ctx.overwritten)
        every_R3SB = all_gather(torch.stack(own).unsqueeze(0), axis)
        own_max_SB, (max_RSB, sum_exp_RSB, target_logit_RSB) = own[0], every_R3SB.unbind(1)
        max_SB, target_logit_SB = max_RSB.amax(0), target_logit_RSB.sum(0)
        sum_exp_SB = (sum_exp_RSB * (max_RSB - max_SB).exp()).sum(0)
        # The backward of a shard counts from the maximum of its own columns.
        sum_from_own_SB = sum_exp_SB * (max_SB - own_max_SB).exp()
        ctx.save_for_backward(logits_SBV, target_SB, own_max_SB, sum_from_own_SB, target_logit_SB)
        ctx.shard, ctx.kernels = shard, kernels
        return sum_exp_SB.log() + max_SB - target_logit_SB

    @staticmethod
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_SBV, *rows = ctx.saved_tensors
        first_row, num_valid = ctx.shard
        # Nobody reads the logits after this: the gradient takes their place, the largest tensor of a step.
        grad_SBV = ctx.kernels.cross_entropy_backward(
            logits_SBV,
            *rows,
            grad_SB,
            vocab_start=first_row,
            num_valid=num_valid,
            in_place=True,
            overwritten=ctx.overwritten,
        )
        return grad_SBV, None, None, None, None


def vocab_parallel_cross_entropy(
    logits_SBV: Tensor, target_SB: Tensor, axis: Axis, *, first_row: int, num_valid: int, kernels: Registry
) -> Tensor:
    """Loss of every token, fp32 [S, B], the same on all ranks of the axis. Where a gradient is needed it overwrites the
    logits, which the caller must not read afterwards.

    Args:
        logits_SBV: this rank's columns [S, B, Vp/tp], any float dtype.
        target_SB: token ids over the whole vocabulary, int64.
        first_row: vocabulary id of this rank's first column.
        num_valid: this rank's columns that are not padding.
    """
    return _VocabParallelLoss.apply(logits_SBV, target_SB, axis, (first_row, num_valid), kernels)


@torch.no_grad()
def vocab_parallel_hits(
    logits_SBV: Tensor, target_SB: Tensor, axis: Axis, *, first_row: int, num_valid: int, kernels: Registry
) -> Tensor:
    """1.0 where no logit of the whole vocabulary exceeds the target's, else 0.0; fp32 [S, B], the same on all ranks.

    Arguments as for `vocab_parallel_cross_entropy`. A target that shares the first place counts.
    """
    max_SB = all_reduce(kernels.local_max(logits_SBV, num_valid), axis, reduction="max")
    row_SB = target_SB - first_row
    elsewhere_SB = (row_SB < 0) | (row_SB >= num_valid)
    held_SB = logits_SBV.gather(-1, row_SB.masked_fill(elsewhere_SB, 0).unsqueeze(-1)).squeeze(-1).to(max_SB.dtype)
    target_logit_SB = all_reduce(held_SB.masked_fill(elsewhere_SB, -torch.inf), axis, reduction="max")
    return (target_logit_SB >= max_SB).float()
