"""How large a GPT or a BERT is and how much it computes, by formula: nothing is allocated.

Per layer, with H hidden, N query heads, G key-value groups, D head size, F feed-forward and u = 2 for a gated MLP,
else 1, the matrices hold

    attention  H(N + 2G)D + NDH        MLP  uHF + FH

weights. A matrix product of one token with a matrix of P weights is 2P operations (multiply and add), and each costs
the same again twice in the backward pass, for the gradients of input and weight. So one token of a sequence of S costs

    3 x 2 x (L x (attention + MLP) + VH)  +  3 x L x 4NDS

where VH is the output layer (the embedding is a look-up and costs nothing) and 4NDS the two products of queries with
keys and probabilities with values. As is customary, the full S x S square is counted although causal attention needs
half of it, norms and activations are left out, and recomputed activations are not counted again: these are the
operations of the model, not of the machine. With NDS = HS, F = 4H this is 72 L H^2 (1 + S/6H + V/12LH) per token.
A BERT's output layer, with its H x H transform, sees only the tokens that are masked: 15 % of all, and is counted so.

Source: Narayanan et al. 2021 (arXiv:2104.04473), equation 3, which has 96 for 72 because it counts recomputation;
Chowdhery et al. 2022 (arXiv:2204.02311), appendix B; Devlin et al. 2018 (arXiv:1810.04805), section 3.1, for 15 %.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import ModelConfig
from megatron3d.errors import ConfigError

_FORWARD_AND_BACKWARD = 3
_MASKED_SHARE = 0.15

# Dense peak TFLOP/s of one device by words of its name, most specific first: (words, 16-bit, fp32, bf16 exists).
# fp32 is without TF32, which torch does not use unless it is asked to. Source: NVIDIA's data sheets; where they print
# figures with sparsity, half of them.
_PEAKS: tuple[tuple[frozenset[str], float, float, bool], ...] = (
    (frozenset({"B200"}), 2250.0, 75.0, True),
    (frozenset({"H200", "NVL"}), 835.5, 60.0, True),
    (frozenset({"H200"}), 989.4, 66.9, True),
    (frozenset({"H100", "PCIE"}), 756.0, 51.2, True),
    (frozenset({"H100", "NVL"}), 835.5, 60.0, True),
    (frozenset({"H100"}), 989.4, 66.9, True),
    (frozenset({"A100"}), 312.0, 19.5, True),
    (frozenset({"L40S"}), 362.05, 91.6, True),
    (frozenset({"L4"}), 121.0, 30.3, True),
    (frozenset({"A10"}), 125.0, 31.2, True),
    (frozenset({"V100", "PCIE"}), 112.0, 14.0, False),
    (frozenset({"V100"}), 125.0, 15.7, False),
)


def parameter_breakdown(model: ModelConfig) -> Mapping[str, int]:
    """Number of parameters of each part of the whole model, over all layers; the vocabulary is not padded.

    Raises: ConfigError if the vocabulary or another size is not known.
    """
    model = _complete(model)
    hidden, layers = model.hidden_size, model.num_layers
    norm_vectors = 2 if model.normalization == "LayerNorm" else 1
    learned = model.position_embedding_type == "learned_absolute"
    parts = {
        "word_embedding": model.vocab_size * hidden,
        "position_embedding": model.max_position_embeddings * hidden if learned else 0,
        "attention": layers * (_attention_weights(model) + _attention_biases(model)),
        "query_key_norms": layers * 2 * norm_vectors * model.kv_channels if model.qk_layernorm else 0,
        "mlp": layers * (_mlp_weights(model) + _mlp_biases(model)),
        # one before or after each half of a layer, and one at an end: the last, or that of the embedding
        "norms": (2 * layers + 1) * norm_vectors * hidden,
        "output": model.vocab_size * hidden if model.untie_embeddings_and_output_weights else 0,
    }
    if model.architecture == "bert":
        square = hidden * hidden + hidden
        parts["token_type_embedding"] = model.num_token_types * hidden
        parts["masked_token_head"] = square + norm_vectors * hidden + model.vocab_size
        parts["binary_head"] = square + 2 * hidden + 2 if model.has_binary_head else 0
    return MappingProxyType(parts)


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model with its true vocabulary, a tied embedding counted once.

    Raises: ConfigError if the vocabulary or another size is not known.
    """
    return sum(parameter_breakdown(model).values())


def flops_per_token(model: ModelConfig) -> float:
    """Floating-point operations of one token's forward and backward pass in a sequence of `seq_length`.

    Raises: ConfigError if the vocabulary or another size is not known.
    """
    model = _complete(model)
    matrices = model.num_layers * (_attention_weights(model) + _mlp_weights(model)) + _output_weights(model)
    attention = model.num_layers * 4 * model.num_attention_heads * model.kv_channels * model.seq_length
    return float(_FORWARD_AND_BACKWARD * (2 * matrices + attention))


def forward_flops_by_layer(model: ModelConfig) -> tuple[float, float]:
    """Operations of one token's forward through one layer, and through the output layer; the embedding costs none.

    Raises: ConfigError if the vocabulary or another size is not known.
    """
    model = _complete(model)
    attention = 4 * model.num_attention_heads * model.kv_channels * model.seq_length
    layer = 2 * (_attention_weights(model) + _mlp_weights(model)) + attention
    return float(layer), float(2 * _output_weights(model))


def flops_per_step(model: ModelConfig, tokens: int) -> float:
    """Floating-point operations of an optimizer step over `tokens` tokens, forward and backward."""
    return flops_per_token(model) * tokens


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense peak of one device in TFLOP/s, or None if the device or its speed at this precision is not known.

    `device_name` is what the driver calls it, such as "NVIDIA H100 80GB HBM3"; `precision` is fp32, bf16 or fp16.
    """
    words = frozenset(re.split(r"[^A-Z0-9]+", device_name.upper()))
    for needed, half, single, has_bf16 in _PEAKS:
        if needed <= words:
            return {"fp32": single, "fp16": half, "bf16": half if has_bf16 else None}.get(precision)
    return None


def _complete(model: ModelConfig) -> ModelConfig:
    """The resolved model, with every size known."""
    model = resolve_model(model)
    sizes = {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--seq-length": model.seq_length,
        "--vocab-size": model.vocab_size,
    }
    missing = [flag for flag, value in sizes.items() if value is None]
    if missing:
        raise ConfigError(f"The size of the model needs {', '.join(missing)}, which is not known yet; give it first.")
    return model


def _output_weights(model: ModelConfig) -> float:
    """Matrix weights of the output layer, by the share of tokens that it sees."""
    if model.architecture == "bert":
        return _MASKED_SHARE * (model.hidden_size + model.vocab_size) * model.hidden_size
    return model.vocab_size * model.hidden_size


def _qkv_width(model: ModelConfig) -> int:
    """Rows of the fused projection of queries, keys and values."""
    return (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels


def _attention_weights(model: ModelConfig) -> int:
    """Matrix weights of one layer's attention."""
    heads_width = model.num_attention_heads * model.kv_channels
    return _qkv_width(model) * model.hidden_size + heads_width * model.hidden_size


def _attention_biases(model: ModelConfig) -> int:
    qkv = _qkv_width(model) if model.add_bias_linear or model.add_qkv_bias else 0
    return qkv + (model.hidden_size if model.add_bias_linear else 0)


def _mlp_weights(model: ModelConfig) -> int:
    """Matrix weights of one layer's MLP; a gate doubles the up projection."""
    up_parts = 2 if model.is_gated else 1
    return (up_parts + 1) * model.ffn_hidden_size * model.hidden_size


def _mlp_biases(model: ModelConfig) -> int:
    up_parts = 2 if model.is_gated else 1
    return up_parts * model.ffn_hidden_size + model.hidden_size if model.add_bias_linear else 0
