"""Llama: transformers' `llama`, with rotary positions, RMSNorm, a gated MLP and grouped queries.

Rotations there are of halves, as ours are without `--rotary-interleaved`, so no rows change places. Scaled rotary
frequencies (Llama 3.1 and later) are refused, since ours are those of Su et al. 2021.

Source of names and layouts: transformers' `modeling_llama.py` (5.23), which the tests run beside ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.convert.family import Family, HfConfig, gate_there, gated, option_misfits
from megatron3d.convert.rows import Component, TensorRule, linear_rows, norm_rows, qkv_sizes, table_row
from megatron3d.errors import CheckpointError


def _to_model(hf: HfConfig) -> ModelConfig:
    hf.expect("pretraining_tp", 1)
    hf.expect("rope_scaling", None)
    heads, positions = hf.integer("num_attention_heads"), hf.integer("max_position_embeddings", 2048)
    bias = hf.flag("mlp_bias", False)
    hf.expect("attention_bias", bias)
    hidden = hf.integer("hidden_size")
    return resolve_model(
        GivenModel(
            num_layers=hf.integer("num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=hf.integer("num_key_value_heads", heads),
            kv_channels=hf.integer("head_dim", max(1, hidden // heads)),
            seq_length=positions,
            max_position_embeddings=positions,
            ffn_hidden_size=hf.integer("intermediate_size"),
            vocab_size=hf.integer("vocab_size"),
            position_embedding_type="rope",
            rotary_base=rotary_base(hf),
            normalization="RMSNorm",
            norm_epsilon=hf.number("rms_norm_eps", 1e-6),
            activation=gated(hf.values.get("hidden_act", "silu"), hf),
            add_bias_linear=bias,
            untie_embeddings_and_output_weights=not hf.flag("tie_word_embeddings", False),
            hidden_dropout=0.0,
            attention_dropout=hf.number("attention_dropout", 0.0),
            init_method_std=hf.number("initializer_range", 0.02),
        )
    )


def rotary_base(hf: HfConfig, *, default: float = 10000.0) -> float:
    """The base of the rotary frequencies, which version 5 of transformers moved into `rope_parameters`.

    Raises:
        CheckpointError: it is no positive number, or the frequencies are scaled.
    """
    nested = hf.nested("rope_parameters")
    nested.expect("rope_type", "default")
    nested.expect("partial_rotary_factor", 1.0, 1)
    base = nested.number("rope_theta", hf.number("rope_theta", default))
    if base <= 0:
        raise CheckpointError(f"{hf.path}: rope_theta {base} must be above 0; correct it")
    return base


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": model.add_bias_linear,
        "attention_dropout": model.attention_dropout,
        "head_dim": model.kv_channels,
        "hidden_act": gate_there(model.activation),
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mlp_bias": model.add_bias_linear,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.norm_epsilon,
        # Version 5 of transformers reads the first of the two, earlier ones the second.
        "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default"},
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
    }


def _misfits(model: ModelConfig) -> list[str]:
    expected = {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "activation": ("swiglu", "geglu", "reglu"),
        "add_qkv_bias": model.add_bias_linear and model.add_qkv_bias,
        "qk_layernorm": False,
        "apply_residual_connection_post_layernorm": False,
        "num_experts": (None, 1),
    }
    return option_misfits(model, expected)


def _rows(model: ModelConfig, num_classes: int) -> list[TensorRule]:
    rows = end_rows(model)
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        rows += [*attention_rows(model, ours, theirs), *mlp_rows(model, ours, theirs)]
    return rows


def end_rows(model: ModelConfig) -> list[TensorRule]:
    """What is not in layers: the embedding, the last norm, and the output layer where it is not tied."""
    hidden = model.hidden_size
    rows = [table_row("embedding.word", "model.embed_tokens", model.vocab_size, hidden)]
    rows += norm_rows("head.norm", "model.norm", hidden, bias=False)
    if model.untie_embeddings_and_output_weights:
        rows.append(table_row("head.output", "lm_head", model.vocab_size, hidden))
    return rows


def attention_rows(model: ModelConfig, ours: str, theirs: str) -> list[TensorRule]:
    """The attention of a layer, and both norms."""
    hidden, sizes, bias = model.hidden_size, qkv_sizes(model), model.add_bias_linear
    qkv = [f"{theirs}.self_attn.{one}_proj" for one in "qkv"]
    return [
        *norm_rows(f"{ours}.attention_norm", f"{theirs}.input_layernorm", hidden, bias=False),
        *linear_rows(f"{ours}.attention.qkv", qkv, (sum(sizes), hidden), sizes=sizes, bias=bias or model.add_qkv_bias),
        *linear_rows(f"{ours}.attention.projection", [f"{theirs}.self_attn.o_proj"], (hidden, sizes[0]), bias=bias),
        *norm_rows(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", hidden, bias=False),
    ]


def mlp_rows(model: ModelConfig, ours: str, theirs: str) -> list[TensorRule]:
    """The MLP of a layer that all tokens pass."""
    names = [f"{theirs}.mlp.{one}_proj" for one in ("gate", "up", "down")]
    return gated_rows(f"{ours}.mlp", names, model.hidden_size, model.ffn_hidden_size, bias=model.add_bias_linear)


def gated_rows(ours: str, theirs: Sequence[str], hidden: int, inner: int, *, bias: bool = False) -> list[TensorRule]:
    """A gated MLP, of which `theirs` are gate, up and down projection."""
    gate, up, down = theirs
    return [
        *linear_rows(f"{ours}.up", [gate, up], (2 * inner, hidden), sizes=(inner, inner), bias=bias),
        *linear_rows(f"{ours}.down", [down], (hidden, inner), bias=bias),
    ]


def _class_name(components: frozenset[Component]) -> str:
    return "LlamaForCausalLM"


LLAMA = Family(
    model_type="llama",
    prefix="model.",
    to_model=_to_model,
    to_hf=_to_hf,
    misfits=_misfits,
    rows=_rows,
    class_name=_class_name,
    derived=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)
