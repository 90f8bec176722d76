"""The layers of a transformer as their papers write them, in float64 and one process: what the real ones must equal.

Nothing here is shared with the project: weights come in as a dictionary by name, heads are looped over, rotations are
products of complex numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import GivenModel, ModelConfig

Weights = Mapping[str, Tensor]


def model_config(**changes: object) -> ModelConfig:
    """A small resolved model, with changes."""
    sizes = {
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "kv_channels": 4,
        "ffn_hidden_size": 24,
        "seq_length": 8,
        "max_position_embeddings": 8,
        "vocab_size": 13,
        "make_vocab_size_divisible_by": 2,
    }
    rest = {"activation": "gelu_tanh", "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return resolve_model(GivenModel(**{**sizes, **rest, **changes}))


def norm(x: Tensor, weights: Weights, name: str, config: ModelConfig) -> Tensor:
    """LayerNorm: (x - mean) / sqrt(variance + e) * w + b. RMSNorm: x / sqrt(mean of squares + e) * w."""
    weight = weights[f"{name}.weight"]
    if config.normalization == "RMSNorm":
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    return centred / (variance + config.norm_epsilon).sqrt() * weight + weights[f"{name}.bias"]


def affine(x: Tensor, weights: Weights, name: str) -> Tensor:
    """x W^T, plus b where there is one."""
    y = torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"])
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def activation(x: Tensor, kind: str) -> Tensor:
    """The elementwise activations by their definitions."""
    if kind == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    positive = torch.where(x > 0, x, 0.0)
    return {"relu": positive, "squared_relu": positive**2}[kind]


def mlp(x: Tensor, weights: Weights, name: str, config: ModelConfig) -> Tensor:
    """down(activation(up(x))), or with a gate, down(activation(gate(x)) * up(x))."""
    wide = affine(x, weights, f"{name}.up")
    gated = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
    if config.activation in gated:
        width = config.ffn_hidden_size
        wide = activation(wide[..., :width], gated[config.activation]) * wide[..., width:]
    else:
        wide = activation(wide, config.activation)
    return affine(wide, weights, f"{name}.down")


def rotate(x_SBD: Tensor, config: ModelConfig, position_ids_BS: Tensor | None) -> Tensor:
    """Turn each pair, read as a complex number, by e^(i position frequency)."""
    length, batch, size = x_SBD.shape
    rotated = int(size * config.rotary_percent)
    if position_ids_BS is None:
        position_ids_BS = torch.arange(length).expand(batch, length)
    frequency = torch.tensor([config.rotary_base ** (-2 * i / rotated) for i in range(rotated // 2)])
    # The tables of the project are fp32, so the angles are too; everything else is fp64.
    angle_SBR = (position_ids_BS.t().unsqueeze(-1).float() * frequency).double()
    turn_SBR = torch.polar(torch.ones_like(angle_SBR), angle_SBR)
    half = rotated // 2
    if config.rotary_interleaved:
        first, second = x_SBD[..., 0:rotated:2], x_SBD[..., 1:rotated:2]
    else:
        first, second = x_SBD[..., :half], x_SBD[..., half:rotated]
    turned = torch.complex(first, second) * turn_SBR
    if config.rotary_interleaved:
        parts = torch.stack([turned.real, turned.imag], -1).flatten(-2)
    else:
        parts = torch.cat([turned.real, turned.imag], -1)
    return torch.cat([parts, x_SBD[..., rotated:]], -1)


def attention(
    x_SBH: Tensor,
    weights: Weights,
    name: str,
    config: ModelConfig,
    *,
    mask_BST: Tensor | None = None,
    position_ids_BS: Tensor | None = None,
) -> Tensor:
    """Each query head by itself: softmax(q k^T / sqrt(D)) v with the key and value head of its group."""
    size, heads, groups = config.kv_channels, config.num_attention_heads, config.num_query_groups
    length = x_SBH.shape[0]
    if mask_BST is None:
        mask_BST = torch.ones(x_SBH.shape[1], length, length, dtype=torch.bool).tril()
    q, k, v = affine(x_SBH, weights, f"{name}.qkv").split([heads * size, groups * size, groups * size], -1)
    if config.qk_layernorm_across_heads:
        q, k = norm(q, weights, f"{name}.query_norm", config), norm(k, weights, f"{name}.key_norm", config)
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        query = q[..., head * size : (head + 1) * size]
        key, value = (one[..., group * size : (group + 1) * size] for one in (k, v))
        if config.qk_layernorm and not config.qk_layernorm_across_heads:
            query = norm(query, weights, f"{name}.query_norm", config)
            key = norm(key, weights, f"{name}.key_norm", config)
        if config.position_embedding_type == "rope":
            query, key = (rotate(one, config, position_ids_BS) for one in (query, key))
        scores_BST = torch.einsum("sbd,tbd->bst", query, key) / math.sqrt(size)
        probability_BST = scores_BST.masked_fill(~mask_BST, -math.inf).softmax(-1)
        outputs.append(torch.einsum("bst,tbd->sbd", probability_BST, value))
    return affine(torch.cat(outputs, -1), weights, f"{name}.projection")


def block(
    x_SBH: Tensor,
    weights: Weights,
    config: ModelConfig,
    *,
    mask_BST: Tensor | None = None,
    position_ids_BS: Tensor | None = None,
    prefix: str = "",
) -> Tensor:
    """A block without dropout."""
    after = config.apply_residual_connection_post_layernorm
    normed = norm(x_SBH, weights, f"{prefix}attention_norm", config)
    y = attention(normed, weights, f"{prefix}attention", config, mask_BST=mask_BST, position_ids_BS=position_ids_BS)
    x_SBH = (normed if after else x_SBH) + y
    normed = norm(x_SBH, weights, f"{prefix}mlp_norm", config)
    return (normed if after else x_SBH) + mlp(normed, weights, f"{prefix}mlp", config)
