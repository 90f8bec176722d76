"""The pairs of sentences that both BERTs of the benchmarks read: random ids of which 15 % are masked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.bench.peers.work import Work

MASKED, MASK_ID = 0.15, 103


@dataclass(frozen=True)
class Pairs:
    """B pairs of S tokens; the second sentence begins in the middle.

    Attributes:
        tokens_BS: ids, MASK_ID where they are masked.
        labels_BS: the ids that were there.
        is_masked_BS: which are to be predicted.
        token_types_BS: 0 in the first sentence, 1 in the second.
        is_next_B: 0 or 1, what the sentence head predicts.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    is_masked_BS: Tensor
    token_types_BS: Tensor
    is_next_B: Tensor


def pairs_of(work: Work) -> Pairs:
    """The step's pairs, the same for every peer."""
    generator = torch.Generator().manual_seed(1)
    shape = (work.num_sequences, work.seq_length)
    labels_BS = torch.randint(MASK_ID + 1, work.vocab_size, shape, generator=generator)
    is_masked_BS = torch.rand(shape, generator=generator) < MASKED
    second_BS = (torch.arange(work.seq_length) >= work.seq_length // 2).long().expand(shape).contiguous()
    is_next_B = torch.randint(2, shape[:1], generator=generator)
    return Pairs(labels_BS.masked_fill(is_masked_BS, MASK_ID), labels_BS, is_masked_BS, second_BS, is_next_B)
