"""A Llama in plain torch, as `plain_torch.py` is a GPT-2: fused attention with grouped queries, RMSNorm, SwiGLU.

Source: Touvron et al. 2023 (Llama 2), section 2.2; the released code's pairs of rotary positions are the two halves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.bench.peers.plain_torch import INIT_STD


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, hidden: int, heads: int, groups: int, ffn: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, hidden // heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = nn.Linear(hidden, (heads + 2 * groups) * self.size, bias=False)
        self.projection = nn.Linear(hidden, hidden, bias=False)
        self.gate_up, self.down = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """[B, S, H] to [B, S, H]."""
        qkv = self.qkv(self.attention_norm(x_BSH)).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q_BNSD, k_BGSD, v_BGSD = qkv.split((self.heads, self.groups, self.groups), dim=1)
        q_BNSD, k_BGSD = (_turned(x, cos_SD, sin_SD) for x in (q_BNSD, k_BGSD))
        mixed_BNSD = F.scaled_dot_product_attention(q_BNSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=True)
        x_BSH = x_BSH + self.projection(mixed_BNSD.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x_BSH)).chunk(2, dim=-1)
        return x_BSH + self.down(F.silu(gate) * up)


def _turned(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x_BNSD.chunk(2, dim=-1)
    return (x_BNSD * cos_SD + torch.cat((-second, first), dim=-1) * sin_SD).to(x_BNSD.dtype)


class PlainLlama(nn.Module):
    """Token ids [B, S] to logits [B, S, V]."""

    def __init__(
        self, *, layers: int, hidden: int, heads: int, groups: int, ffn: int, vocabulary: int, tied: bool, base: float
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, groups, ffn) for _ in range(layers))
        self.norm, self.output = nn.RMSNorm(hidden, eps=1e-5), nn.Linear(hidden, vocabulary, bias=False)
        if tied:
            self.output.weight = self.tokens.weight
        self.base, self.size = base, hidden // heads
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """The logits."""
        x_BSH, positions_S = self.tokens(tokens_BS), torch.arange(tokens_BS.size(1), device=tokens_BS.device)
        frequencies = self.base ** (-torch.arange(0, self.size, 2, device=tokens_BS.device) / self.size)
        angles_SD = (positions_S[:, None] * frequencies).repeat(1, 2)
        for block in self.blocks:
            x_BSH = block(x_BSH, angles_SD.cos(), angles_SD.sin())
        return self.output(self.norm(x_BSH))
