"""Losses as sums: never averaged here, so that micro-batches with different counts add up exactly.

Shapes: S sequence and B micro-batch, or any other dimensions that number the labels; V vocabulary, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron3d.tensor.chunked_loss import ChunkedProjection, chunked_cross_entropy
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.embedding import VocabParallelEmbedding
from megatron3d.tensor.loss import vocab_parallel_cross_entropy, vocab_parallel_hits


def masked_loss_sum(
    logits_SBV: Tensor,
    labels_SB: Tensor,
    loss_mask_SB: Tensor | None,
    *,
    table: VocabParallelEmbedding,
    context: LayerContext,
) -> Tensor:
    """Sum over tokens of cross-entropy times mask, an fp32 scalar, the same on all tensor-parallel ranks.

    Args:
        logits_SBV: this rank's columns [S, B, Vp/tp] of the logits.
        labels_SB: token ids to predict, int64, contiguous.
        loss_mask_SB: weight of each token's loss, fp32; None weighs all alike.
        table: says which rows of the vocabulary this rank holds.
    """
    loss_SB = vocab_parallel_cross_entropy(
        logits_SBV,
        labels_SB,
        context.tp,
        first_row=table.first_row,
        num_valid=table.num_valid_rows,
        kernels=context.kernels,
    )
    return loss_SB.sum() if loss_mask_SB is None else (loss_SB * loss_mask_SB).sum()


def chunked_loss_and_hits(
    x: Tensor, labels: Tensor, loss_mask: Tensor | None, projection: ChunkedProjection
) -> tuple[Tensor, Tensor]:
    """What `masked_loss_sum` and `masked_hits` give of the logits of hidden vectors, which are made in chunks.

    Args:
        x: [S, B, H] (S local under sequence parallelism) or [P, H], of the projection's type.
        labels: token ids to predict, int64 [S, B] or [P].
        loss_mask: weight of each token's loss, fp32; None weighs all alike.
        projection: from hidden vectors to losses.
    """
    loss, hits = chunked_cross_entropy(x, labels, projection)
    if loss_mask is None:
        return loss.sum(), hits.sum()
    return (loss * loss_mask).sum(), (hits * loss_mask).sum()


def num_chunks(num_positions: int, chunk_size: int) -> int:
    """Chunks of a micro-batch, of about equal size and at most `chunk_size` positions."""
    return -(-num_positions // chunk_size)


def masked_hits(
    logits_SBV: Tensor,
    labels_SB: Tensor,
    loss_mask_SB: Tensor,
    *,
    table: VocabParallelEmbedding,
    context: LayerContext,
) -> Tensor:
    """How many labels score highest of the whole vocabulary, weighted by the mask: an fp32 scalar without gradient.

    Arguments as for `masked_loss_sum`; to be called before it, since it overwrites the logits.
    """
    hits_SB = vocab_parallel_hits(
        logits_SBV,
        labels_SB,
        context.tp,
        first_row=table.first_row,
        num_valid=table.num_valid_rows,
        kernels=context.kernels,
    )
    return (hits_SB * loss_mask_SB).sum()


def class_loss_sum(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Sum over samples of the cross-entropy of a few classes whose logits every rank holds whole; fp32 scalar."""
    return F.cross_entropy(logits_BC.float(), labels_B, reduction="sum")


def class_hits(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """How many samples score highest in their own class: an fp32 scalar."""
    return (logits_BC.argmax(-1) == labels_B).float().sum()
