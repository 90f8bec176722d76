"""BERT: transformers' `bert`, whose norms follow each residual sum, and `megatron-bert`, whose norms precede.

Both are read into the same model of ours; `--norm-position` says which of the two it is. Heads are components: a bare
model, one with the heads of pre-training, and a classifier differ in which of them are there.

Source of names and layouts: transformers' `modeling_bert.py` and `modeling_megatron_bert.py` (5.23), which the tests
run beside ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.convert.family import Family, HfConfig, activation_there, option_misfits
from megatron3d.convert.rows import Component, TensorRule, linear_rows, norm_rows, qkv_sizes, table_row

_PLAIN = ("gelu", "gelu_tanh", "relu", "squared_relu", "silu")


@dataclass(frozen=True)
class _Names:
    """Where the two kinds differ: the names of the norms, and transformers' names of the classes."""

    norm_position: str
    embedding_norm: str | None
    attention_norm: str
    mlp_norm: str
    last_norm: str | None
    classes: str


_POST = _Names(
    "post",
    "bert.embeddings.LayerNorm",
    "attention.output.LayerNorm",
    "output.LayerNorm",
    last_norm=None,
    classes="Bert",
)
_PRE = _Names("pre", None, "attention.ln", "ln", last_norm="bert.encoder.ln", classes="MegatronBert")


def _to_model(names: _Names, hf: HfConfig) -> ModelConfig:
    hf.expect("position_embedding_type", "absolute", None)
    hf.expect("is_decoder", False, None)
    hf.expect("add_cross_attention", False, None)
    positions = hf.integer("max_position_embeddings", 512)
    return resolve_model(
        GivenModel(
            architecture="bert",
            num_layers=hf.integer("num_hidden_layers", 12),
            hidden_size=hf.integer("hidden_size", 768),
            num_attention_heads=hf.integer("num_attention_heads", 12),
            seq_length=positions,
            max_position_embeddings=positions,
            ffn_hidden_size=hf.integer("intermediate_size", 3072),
            vocab_size=hf.integer("vocab_size", 30522),
            norm_epsilon=hf.number("layer_norm_eps", 1e-12),
            norm_position=names.norm_position,
            activation=hf.activation("hidden_act", "gelu"),
            untie_embeddings_and_output_weights=not hf.flag("tie_word_embeddings", True),
            hidden_dropout=hf.number("hidden_dropout_prob", 0.1),
            attention_dropout=hf.number("attention_probs_dropout_prob", 0.1),
            init_method_std=hf.number("initializer_range", 0.02),
            num_token_types=hf.integer("type_vocab_size", 2),
        )
    )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        "attention_probs_dropout_prob": model.attention_dropout,
        "hidden_act": activation_there(model.activation),
        "hidden_dropout_prob": model.hidden_dropout,
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "layer_norm_eps": model.norm_epsilon,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "pad_token_id": 0,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "type_vocab_size": model.num_token_types or 2,
        "vocab_size": model.vocab_size,
    }


def _misfits(names: _Names, model: ModelConfig) -> list[str]:
    expected = {
        "norm_position": names.norm_position,
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "activation": _PLAIN,
        "add_bias_linear": True,
        "qk_layernorm": False,
        "apply_residual_connection_post_layernorm": False,
        "num_query_groups": model.num_attention_heads,
        "kv_channels": model.hidden_size // model.num_attention_heads,
    }
    return option_misfits(model, expected)


def _rows(names: _Names, model: ModelConfig, num_classes: int) -> list[TensorRule]:
    hidden = model.hidden_size
    embeddings = "bert.embeddings"
    rows = [
        table_row("embedding.word", f"{embeddings}.word_embeddings", model.vocab_size, hidden),
        table_row("embedding.position", f"{embeddings}.position_embeddings", model.max_position_embeddings, hidden),
        _token_types(model, f"{embeddings}.token_type_embeddings"),
    ]
    if names.embedding_norm is not None:
        rows += norm_rows("embedding.norm", names.embedding_norm, hidden)
    for layer in range(model.num_layers):
        rows += _layer_rows(names, model, f"layers.{layer}", f"bert.encoder.layer.{layer}")
    if names.last_norm is not None:
        rows += norm_rows("head.norm", names.last_norm, hidden)
    rows += linear_rows("head.pooler", ["bert.pooler.dense"], (hidden, hidden), component="pooler")
    rows += _token_head(model)
    rows += linear_rows("head.binary", ["cls.seq_relationship"], (2, hidden), component="pairs")
    return rows + linear_rows("head.classifier", ["classifier"], (num_classes, hidden), component="classes")


def _token_types(model: ModelConfig, theirs: str) -> TensorRule:
    """A model of ours without segments is there one whose segments add nothing."""
    if model.num_token_types:
        return table_row("embedding.token_type", theirs, model.num_token_types, model.hidden_size)
    return TensorRule(None, (f"{theirs}.weight",), (2, model.hidden_size))


def _layer_rows(names: _Names, model: ModelConfig, ours: str, theirs: str) -> list[TensorRule]:
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    sizes = qkv_sizes(model)
    parts = [f"{theirs}.attention.self.{one}" for one in ("query", "key", "value")]
    return [
        *linear_rows(f"{ours}.attention.qkv", parts, (sum(sizes), hidden), sizes=sizes),
        *linear_rows(f"{ours}.attention.projection", [f"{theirs}.attention.output.dense"], (hidden, hidden)),
        *norm_rows(f"{ours}.attention_norm", f"{theirs}.{names.attention_norm}", hidden),
        *linear_rows(f"{ours}.mlp.up", [f"{theirs}.intermediate.dense"], (inner, hidden)),
        *linear_rows(f"{ours}.mlp.down", [f"{theirs}.output.dense"], (hidden, inner)),
        *norm_rows(f"{ours}.mlp_norm", f"{theirs}.{names.mlp_norm}", hidden),
    ]


def _token_head(model: ModelConfig) -> list[TensorRule]:
    hidden, there = model.hidden_size, "cls.predictions"
    rows = linear_rows("head.transform", [f"{there}.transform.dense"], (hidden, hidden), component="tokens")
    rows += norm_rows("head.transform_norm", f"{there}.transform.LayerNorm", hidden, component="tokens")
    if not model.untie_embeddings_and_output_weights:
        return [*rows, TensorRule("head.output_bias", (f"{there}.bias",), (model.vocab_size,), component="tokens")]
    # With a table of its own the decoder also has a bias of its own, and the other is not used.
    return [
        *rows,
        table_row("head.output", f"{there}.decoder", model.vocab_size, hidden, component="tokens"),
        TensorRule("head.output_bias", (f"{there}.decoder.bias",), (model.vocab_size,), component="tokens"),
    ]


def _copies(model: ModelConfig) -> Mapping[str, str]:
    untied = model.untie_embeddings_and_output_weights
    return {"cls.predictions.bias": "cls.predictions.decoder.bias"} if untied else {}


def _class_name(names: _Names, components: frozenset[Component]) -> str:
    if "classes" in components:
        return f"{names.classes}ForSequenceClassification"
    if "tokens" in components:
        return f"{names.classes}ForPreTraining" if "pairs" in components else f"{names.classes}ForMaskedLM"
    return f"{names.classes}Model"


def _family(model_type: str, names: _Names) -> Family:
    return Family(
        model_type=model_type,
        prefix="bert.",
        to_model=partial(_to_model, names),
        to_hf=_to_hf,
        misfits=partial(_misfits, names),
        rows=partial(_rows, names),
        class_name=partial(_class_name, names),
        derived=(
            r"(bert\.)?embeddings\.position_ids",
            r"cls\.predictions\.decoder\.(weight|bias)",
            r"cls\.predictions\.bias",
        ),
        copies=_copies,
        tied={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
    )


BERT = _family("bert", _POST)
MEGATRON_BERT = _family("megatron-bert", _PRE)
