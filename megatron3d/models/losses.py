"""Losses as sums: never averaged here, so that micro-batches with different counts add up exactly."""

from __future__ import annotations

from torch import Tensor

from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.embedding import VocabParallelEmbedding
from megatron3d.tensor.loss import vocab_parallel_cross_entropy


def masked_loss_sum(
    logits_SBV: Tensor,
    labels_BS: Tensor,
    loss_mask_BS: Tensor | None,
    *,
    table: VocabParallelEmbedding,
    context: LayerContext,
) -> Tensor:
    """Sum over tokens of cross-entropy times mask, an fp32 scalar, the same on all tensor-parallel ranks.

    Args:
        logits_SBV: this rank's columns [S, B, Vp/tp] of the logits.
        labels_BS: token ids to predict, int64.
        loss_mask_BS: weight of each token's loss, fp32; None weighs all alike.
        table: says which rows of the vocabulary this rank holds.
    """
    loss_SB = vocab_parallel_cross_entropy(
        logits_SBV,
        labels_BS.t().contiguous(),
        context.tp,
        first_row=table.first_row,
        num_valid=table.num_valid_rows,
        kernels=context.kernels,
    )
    return loss_SB.sum() if loss_mask_BS is None else (loss_SB * loss_mask_BS.t()).sum()
