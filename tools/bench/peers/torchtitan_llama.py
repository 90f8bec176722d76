"""Torchtitan's Llama 3, its nearest model to GPT-2: rotary positions, RMSNorm, no biases, SwiGLU of the same size.

Its language models take attention by FlexAttention, which has no backward on a CPU, or by a kernel that needs CUDA;
the module of torch's fused attention, which torchtitan has for other models, is put in their place.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torchtitan.models import llama3
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention

from tools.bench.peers.trainee import Trainee, module_trainee
from tools.bench.peers.work import Work


def config_of(work: Work) -> llama3.Llama3Model.Config:
    """The shape: a SwiGLU of 8/3 the hidden size has as many parameters as a GELU MLP of four times."""
    hidden_size, num_heads = work.hidden_size, work.num_attention_heads
    rope = ComplexRoPE.Config(dim=hidden_size // num_heads, max_seq_len=work.seq_length)
    layers = llama3._build_llama3_layers(
        n_layers=work.num_layers,
        dim=hidden_size,
        n_heads=num_heads,
        hidden_dim=hidden_size * 8 // 3,
        rope=rope,
        attn_backend="flex",
    )
    attention = ScaledDotProductAttention.Config()
    layers = [replace(one, attention=replace(one.attention, inner_attention=attention)) for one in layers]
    is_tied = work.layout != "pp"  # which it refuses
    init = llama3._EMBEDDING_SKIP_INIT if is_tied else llama3._EMBEDDING_INIT
    return llama3.Llama3Model.Config(
        dim=hidden_size,
        vocab_size=work.vocab_size,
        enable_weight_tying=is_tied,
        tok_embeddings=Embedding.Config(num_embeddings=work.vocab_size, embedding_dim=hidden_size, param_init=init),
        norm=RMSNorm.Config(normalized_shape=hidden_size, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=hidden_size, out_features=work.vocab_size, param_init=llama3._output_linear_init(hidden_size)
        ),
        layers=layers,
    )


def build(work: Work) -> Trainee:
    """The model in one process."""
    model = config_of(work).build()
    model.init_states(buffer_device=torch.device("cpu"))
    model.train()
    return module_trainee(model, lambda tokens_BS: model(tokens_BS, positions_of(tokens_BS), None), work)


def positions_of(tokens_BS: torch.Tensor) -> torch.Tensor:
    """What the model asks for beside tokens [B, S]."""
    return torch.arange(tokens_BS.size(1)).expand(tokens_BS.size(0), -1).contiguous()
