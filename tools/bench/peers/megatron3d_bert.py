"""This project's BERT with both heads and norms behind the residual sums, as the BERT of transformers has them."""

from __future__ import annotations

import torch

from megatron3d.data.batch import BertBatch
from megatron3d.models.bert import build_bert_stage
from tools.bench.peers.bert_batch import pairs_of
from tools.bench.peers.megatron3d_flags import flags_of
from tools.bench.peers.megatron3d_gpt import trainee_of
from tools.bench.peers.trainee import Trainee
from tools.bench.peers.work import Work


def build(work: Work) -> Trainee:
    """The model in one process."""
    pairs = pairs_of(work)
    is_token_BS = torch.ones(pairs.tokens_BS.shape, dtype=torch.bool)
    batch = BertBatch(
        pairs.tokens_BS,
        pairs.labels_BS,
        pairs.is_masked_BS.float(),
        pairs.token_types_BS,
        is_token_BS,
        pairs.is_next_B,
    )
    return trainee_of(work, [*flags_of(work), "--norm-position", "post"], "bert", build_bert_stage, batch)
