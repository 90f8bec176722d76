"""Hugging Face transformers' BERT with both of its heads, torch's fused attention and fused AdamW, in plain torch."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForPreTraining

from tools.bench.peers.bert_batch import pairs_of
from tools.bench.peers.trainee import Trainee, autocast, fused_adamw
from tools.bench.peers.work import Work

IGNORED = -100  # a label that its loss leaves out


def build(work: Work) -> Trainee:
    """The model in one process."""
    config = BertConfig(
        vocab_size=work.vocab_size,
        max_position_embeddings=work.seq_length,
        hidden_size=work.hidden_size,
        num_hidden_layers=work.num_layers,
        num_attention_heads=work.num_attention_heads,
        intermediate_size=4 * work.hidden_size,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    model = BertForPreTraining(config).train()
    optimizer, pairs = fused_adamw(model), pairs_of(work)
    labels_BS = pairs.labels_BS.masked_fill(~pairs.is_masked_BS, IGNORED)

    def step() -> float:
        with autocast(work):
            loss = model(
                input_ids=pairs.tokens_BS,
                token_type_ids=pairs.token_types_BS,
                attention_mask=torch.ones_like(pairs.tokens_BS),
                labels=labels_BS,
                next_sentence_label=pairs.is_next_B,
            ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Trainee(step, sum(p.numel() for p in model.parameters()))
