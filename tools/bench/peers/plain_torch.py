"""A GPT-2 in plain torch, as a careful person writes it in an evening: fused attention, tied table, fused AdamW.

The yardstick for what the frameworks add. No attempt at being clever: what torch ships, called directly.
"""

from __future__ import annotations

import torch
from torch import nn

from tools.bench.peers.trainee import Trainee, module_trainee
from tools.bench.peers.work import Work

INIT_STD = 0.02


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.qkv, self.projection = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        self.up, self.down = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """[B, S, H] to [B, S, H]."""
        qkv = self.qkv(self.attention_norm(x_BSH)).unflatten(-1, (3, self.num_heads, -1))
        q_BNSD, k_BNSD, v_BNSD = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed_BNSD = nn.functional.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, is_causal=True)
        x_BSH = x_BSH + self.projection(mixed_BNSD.transpose(1, 2).flatten(2))
        return x_BSH + self.down(nn.functional.gelu(self.up(self.mlp_norm(x_BSH))))


class PlainGPT(nn.Module):
    """Token ids [B, S] to logits [B, S, V]."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.tokens = nn.Embedding(work.vocab_size, work.hidden_size)
        self.positions = nn.Embedding(work.seq_length, work.hidden_size)
        self.blocks = nn.ModuleList(Block(work.hidden_size, work.num_attention_heads) for _ in range(work.num_layers))
        self.norm = nn.LayerNorm(work.hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """The logits; the table of tokens is the output layer's weight too."""
        x_BSH = self.tokens(tokens_BS) + self.positions(torch.arange(tokens_BS.size(1), device=tokens_BS.device))
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return nn.functional.linear(self.norm(x_BSH), self.tokens.weight)


def build(work: Work) -> Trainee:
    """The model in one process, through torch.compile where the work says so."""
    model = PlainGPT(work)
    if work.compiled:
        model.compile()
    return module_trainee(model, model, work)
