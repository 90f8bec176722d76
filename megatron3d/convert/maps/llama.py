"""Llama and the dense models like it: transformers' `llama`, `mistral`, `qwen2` and `qwen3`.

    llama      biases everywhere or nowhere; from 3.1 on with scaled rotary frequencies
    mistral    no biases; in its first version a sliding window
    qwen2      biases of queries, keys and values alone
    qwen3      no biases; norms of each head's queries and keys

All have rotary positions, RMSNorm, a gated MLP and grouped queries. Rotations there are of halves, as ours are without
`--rotary-interleaved`, so no rows change places. A model whose attention has a window is taken where no text is longer
than that window, which then bars nothing.

Source of names and layouts: transformers' `modeling_*.py` of these (5.23), beside which the tests run ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.convert.family import Family, HfConfig, gate_there, gated, option_misfits
from megatron3d.convert.rope_parameters import rope_fields, rotary_options
from megatron3d.convert.rows import Component, TensorRule, linear_rows, norm_rows, qkv_sizes, table_row
from megatron3d.errors import CheckpointError


@dataclass(frozen=True)
class _Kind:
    """How one of these families differs from the others.

    Attributes:
        model_type: as `config.json` calls it.
        name: how the names of its classes begin.
        positions: `max_position_embeddings` where a `config.json` lacks it.
        head_dim: likewise; None is the hidden size over the heads.
        biases: of linear layers: none, all of them where it says so, or those of queries, keys and values.
        has_qk_norms: whether each head's queries and keys are normalised.
        window: how `config.json` speaks of a sliding window: not at all, for all layers, or for the later ones with a
            switch.
    """

    model_type: str
    name: str
    positions: int
    head_dim: int | None = None
    biases: str = "none"
    has_qk_norms: bool = False
    window: str = "none"


_LLAMA = _Kind("llama", "Llama", 2048, biases="all")
_MISTRAL = _Kind("mistral", "Mistral", 131072, window="all")
_QWEN2 = _Kind("qwen2", "Qwen2", 32768, biases="qkv", window="later")
_QWEN3 = _Kind("qwen3", "Qwen3", 32768, head_dim=128, has_qk_norms=True, window="later")


def _to_model(kind: _Kind, hf: HfConfig) -> ModelConfig:
    heads, hidden = hf.integer("num_attention_heads"), hf.integer("hidden_size")
    positions = hf.integer("max_position_embeddings", kind.positions)
    _check_window(kind, hf, positions)
    bias = kind.biases == "all" and hf.flag("mlp_bias", False)
    hf.expect("pretraining_tp", 1)
    if kind.biases != "qkv":  # which has its biases whatever that field says
        hf.expect("attention_bias", bias)
    return resolve_model(
        GivenModel(
            num_layers=hf.integer("num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=hf.integer("num_key_value_heads", heads),
            kv_channels=hf.integer("head_dim", kind.head_dim or max(1, hidden // heads)),
            seq_length=positions,
            max_position_embeddings=positions,
            ffn_hidden_size=hf.integer("intermediate_size"),
            vocab_size=hf.integer("vocab_size"),
            position_embedding_type="rope",
            **rotary_options(hf, positions=positions),
            normalization="RMSNorm",
            norm_epsilon=hf.number("rms_norm_eps", 1e-6),
            activation=gated(hf.values.get("hidden_act", "silu"), hf),
            add_bias_linear=bias,
            add_qkv_bias=kind.biases == "qkv",
            qk_layernorm=kind.has_qk_norms,
            untie_embeddings_and_output_weights=not hf.flag("tie_word_embeddings", False),
            hidden_dropout=0.0,
            attention_dropout=hf.number("attention_dropout", 0.0),
            init_method_std=hf.number("initializer_range", 0.02),
        )
    )


def _check_window(kind: _Kind, hf: HfConfig, positions: int) -> None:
    """Refuse a window in which a text of all positions does not fit, in any layer.

    Raises: CheckpointError with what to change.
    """
    layers = hf.integer("num_hidden_layers")
    types = hf.values.get("layer_types") or ()
    if not isinstance(types, list | tuple) or any(one not in ("full_attention", "sliding_attention") for one in types):
        raise CheckpointError(
            f"{hf.path}: layer_types {types!r:.60} cannot be converted; only full_attention and sliding_attention can"
        )
    has_window = kind.window == "all" or (
        kind.window == "later"
        and hf.flag("use_sliding_window", False)
        and hf.integer("max_window_layers", 28, least=0) < layers
    )
    window = hf.integer("sliding_window", 4096) if hf.values.get("sliding_window", 4096) is not None else None
    if (has_window or "sliding_attention" in types) and window is not None and window < positions:
        raise CheckpointError(
            f"{hf.path}: sliding_window {window} is shorter than max_position_embeddings {positions}, and tokens here "
            "see all earlier ones; set max_position_embeddings to the window, up to which both compute the same"
        )


def _to_hf(kind: _Kind, model: ModelConfig) -> dict[str, Any]:
    values = {
        "attention_dropout": model.attention_dropout,
        "head_dim": model.kv_channels,
        "hidden_act": gate_there(model.activation),
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.norm_epsilon,
        **rope_fields(model),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
    }
    if kind.biases == "all":
        values |= {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
    if kind.has_qk_norms:
        values["attention_bias"] = False
    if kind.window == "all":
        values["sliding_window"] = None
    if kind.window == "later":
        values |= {"use_sliding_window": False, "layer_types": ["full_attention"] * model.num_layers}
    return values


def _misfits(kind: _Kind, model: ModelConfig) -> list[str]:
    biases = {
        "all": {"add_qkv_bias": model.add_bias_linear and model.add_qkv_bias},
        "qkv": {"add_bias_linear": False, "add_qkv_bias": True},
        "none": {"add_bias_linear": False, "add_qkv_bias": False},
    }
    expected = {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "activation": ("swiglu", "geglu", "reglu"),
        **biases[kind.biases],
        "qk_layernorm": kind.has_qk_norms,
        "qk_layernorm_across_heads": False,
        "apply_residual_connection_post_layernorm": False,
        "num_experts": (None, 1),
    }
    return option_misfits(model, expected)


def _rows(kind: _Kind, model: ModelConfig, num_classes: int) -> list[TensorRule]:
    rows = end_rows(model)
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        rows += [*attention_rows(model, ours, theirs), *mlp_rows(model, ours, theirs)]
        for one in ("query", "key") if kind.has_qk_norms else ():
            norm = f"{theirs}.self_attn.{one[0]}_norm"
            rows += norm_rows(f"{ours}.attention.{one}_norm", norm, model.kv_channels, bias=False)
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


def _class_name(kind: _Kind, components: frozenset[Component]) -> str:
    return f"{kind.name}ForCausalLM"


def _family(kind: _Kind) -> Family:
    return Family(
        model_type=kind.model_type,
        prefix="model.",
        to_model=partial(_to_model, kind),
        to_hf=partial(_to_hf, kind),
        misfits=partial(_misfits, kind),
        rows=partial(_rows, kind),
        class_name=partial(_class_name, kind),
        derived=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )


LLAMAS = tuple(_family(kind) for kind in (_MISTRAL, _QWEN2, _QWEN3, _LLAMA))
