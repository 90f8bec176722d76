"""Hugging Face transformers' GPT-2 with torch's fused attention and fused AdamW, in a loop of plain torch."""

from __future__ import annotations

from transformers import GPT2Config, GPT2LMHeadModel

from tools.bench.peers.trainee import Trainee, module_trainee
from tools.bench.peers.work import Work


def build(work: Work) -> Trainee:
    """The model in one process."""
    config = GPT2Config(
        vocab_size=work.vocab_size,
        n_positions=work.seq_length,
        n_embd=work.hidden_size,
        n_layer=work.num_layers,
        n_head=work.num_attention_heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).train()
    return module_trainee(model, lambda tokens_BS: model(input_ids=tokens_BS).logits, work)
