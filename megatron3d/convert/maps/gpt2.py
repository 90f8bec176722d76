"""GPT-2: transformers' `gpt2`, with learned positions, LayerNorm, biases, and linear maps stored as [in, out].

Query, key and value are fused there as they are here, in the same order.

Source of names and layouts: transformers' `modeling_gpt2.py` (5.23), which the tests run beside ours.
"""

from __future__ import annotations

from typing import Any

from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.convert.family import Family, HfConfig, activation_there, option_misfits
from megatron3d.convert.rows import Component, TensorRule, linear_rows, norm_rows, qkv_sizes, table_row

_PLAIN = ("gelu", "gelu_tanh", "relu", "squared_relu", "silu")


def _to_model(hf: HfConfig) -> ModelConfig:
    hf.expect("scale_attn_weights", True)
    hf.expect("scale_attn_by_inverse_layer_idx", False)
    hf.expect("add_cross_attention", False)
    positions, hidden = hf.integer("n_positions", 1024), hf.integer("n_embd", 768)
    return resolve_model(
        GivenModel(
            num_layers=hf.integer("n_layer", 12),
            hidden_size=hidden,
            num_attention_heads=hf.integer("n_head", 12),
            seq_length=positions,
            max_position_embeddings=positions,
            ffn_hidden_size=hf.integer("n_inner", 4 * hidden),
            vocab_size=hf.integer("vocab_size", 50257),
            norm_epsilon=hf.number("layer_norm_epsilon", 1e-5),
            activation=hf.activation("activation_function", "gelu_new"),
            untie_embeddings_and_output_weights=not hf.flag("tie_word_embeddings", True),
            hidden_dropout=hf.number("resid_pdrop", 0.1),
            attention_dropout=hf.number("attn_pdrop", 0.1),
            init_method_std=hf.number("initializer_range", 0.02),
        )
    )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        "activation_function": activation_there(model.activation),
        "attn_pdrop": model.attention_dropout,
        "embd_pdrop": model.hidden_dropout,
        "initializer_range": model.init_method_std,
        "layer_norm_epsilon": model.norm_epsilon,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_positions": model.max_position_embeddings,
        "resid_pdrop": model.hidden_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
    }


def _misfits(model: ModelConfig) -> list[str]:
    expected = {
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "activation": _PLAIN,
        "add_bias_linear": True,
        "qk_layernorm": False,
        "apply_residual_connection_post_layernorm": False,
        "num_query_groups": model.num_attention_heads,
        "kv_channels": model.hidden_size // model.num_attention_heads,
        "num_experts": (None, 1),
    }
    return option_misfits(model, expected)


def _rows(model: ModelConfig, num_classes: int) -> list[TensorRule]:
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    rows = [
        table_row("embedding.word", "transformer.wte", model.vocab_size, hidden),
        table_row("embedding.position", "transformer.wpe", model.max_position_embeddings, hidden),
    ]
    for layer in range(model.num_layers):
        here, there = f"layers.{layer}", f"transformer.h.{layer}"
        rows += [
            *norm_rows(f"{here}.attention_norm", f"{there}.ln_1", hidden),
            *_linear(f"{here}.attention.qkv", f"{there}.attn.c_attn", (sum(qkv_sizes(model)), hidden)),
            *_linear(f"{here}.attention.projection", f"{there}.attn.c_proj", (hidden, hidden)),
            *norm_rows(f"{here}.mlp_norm", f"{there}.ln_2", hidden),
            *_linear(f"{here}.mlp.up", f"{there}.mlp.c_fc", (inner, hidden)),
            *_linear(f"{here}.mlp.down", f"{there}.mlp.c_proj", (hidden, inner)),
        ]
    rows += norm_rows("head.norm", "transformer.ln_f", hidden)
    if model.untie_embeddings_and_output_weights:
        rows.append(table_row("head.output", "lm_head", model.vocab_size, hidden))
    return rows


def _linear(ours: str, theirs: str, shape: tuple[int, int]) -> list[TensorRule]:
    return linear_rows(ours, [theirs], shape, transposed=True)


def _class_name(components: frozenset[Component]) -> str:
    return "GPT2LMHeadModel"


GPT2 = Family(
    model_type="gpt2",
    prefix="transformer.",
    to_model=_to_model,
    to_hf=_to_hf,
    misfits=_misfits,
    rows=_rows,
    class_name=_class_name,
    derived=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
    tied={"lm_head.weight": "transformer.wte.weight"},
)
