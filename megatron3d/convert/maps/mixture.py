"""Mixtures of experts like Llama in everything else: transformers' `mixtral` and `qwen3_moe`.

    mixtral      experts in all layers; softmax over the chosen ones, so that a token's weights add up to one
    qwen3_moe    experts in some layers; norms of each head's queries and keys; weights that add up to one, or the
                 scores as they are (`norm_topk_prob`)

Each of our experts has its gate and up projection fused; the router is a matrix in both. The loss of balance there is
one of all layers together, and its coefficient is left to the options of the training here.

Source of names and layouts: transformers' `modeling_mixtral.py` and `modeling_qwen3_moe.py` (5.24), beside which the
tests run ours.
"""

from __future__ import annotations

from typing import Any

from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.convert.family import Family, HfConfig, gate_there, gated, option_misfits
from megatron3d.convert.maps.llama import attention_rows, end_rows, mlp_rows, rotary_base
from megatron3d.convert.rows import Component, TensorRule, linear_rows, norm_rows
from megatron3d.errors import CheckpointError

# What no model of these families has.
_NOT_THERE = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "activation": ("swiglu", "geglu", "reglu"),
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "apply_residual_connection_post_layernorm": False,
    "moe_router_score_function": "softmax",
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_expert_capacity_factor": None,
    "moe_router_force_load_balancing": False,
}
_FOR_TRAINING = (r"layers\.\d+\.mlp\.router\.previous",)  # of the loss of balance over the global batch


def _given(hf: HfConfig) -> dict[str, Any]:
    """What both families have."""
    hf.expect("rope_scaling", None)
    hf.expect("attention_bias", False)
    heads, hidden = hf.integer("num_attention_heads"), hf.integer("hidden_size")
    positions = hf.integer("max_position_embeddings", 32768)
    return {
        "num_layers": hf.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": hf.integer("num_key_value_heads", heads),
        "kv_channels": hf.integer("head_dim", max(1, hidden // heads)),
        "seq_length": positions,
        "max_position_embeddings": positions,
        "ffn_hidden_size": hf.integer("intermediate_size"),
        "vocab_size": hf.integer("vocab_size"),
        "position_embedding_type": "rope",
        "rotary_base": rotary_base(hf, default=1e6),
        "normalization": "RMSNorm",
        "norm_epsilon": hf.number("rms_norm_eps", 1e-5),
        "activation": gated(hf.values.get("hidden_act", "silu"), hf),
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not hf.flag("tie_word_embeddings", False),
        "hidden_dropout": 0.0,
        "attention_dropout": hf.number("attention_dropout", 0.0),
        "init_method_std": hf.number("initializer_range", 0.02),
    }


def _there(model: ModelConfig) -> dict[str, Any]:
    return {
        "attention_dropout": model.attention_dropout,
        "head_dim": model.kv_channels,
        "hidden_act": gate_there(model.activation),
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_attention_heads,
        "num_experts_per_tok": model.moe_router_topk,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "num_local_experts": model.num_experts,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default"},
        "rope_theta": model.rotary_base,
        "sliding_window": None,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
    }


def _misfits(model: ModelConfig, **expected: Any) -> list[str]:
    found = option_misfits(model, {**_NOT_THERE, **expected})
    return found if model.has_experts else [*found, f"num_experts {model.num_experts} (there only 2 or more)"]


def _expert_rows(model: ModelConfig, ours: str, theirs: str, names: tuple[str, str, str]) -> list[TensorRule]:
    """The experts of a layer; `names` are those of gate, up and down projection."""
    hidden, inner = model.hidden_size, model.expert_ffn_hidden_size
    gate, up, down = names
    rows = []
    for number in range(model.num_experts or 0):
        expert = f"{theirs}.experts.{number}"
        fused = [f"{expert}.{gate}", f"{expert}.{up}"]
        own = f"{ours}.experts.{number}"
        rows += linear_rows(f"{own}.up", fused, (2 * inner, hidden), sizes=(inner, inner), bias=False)
        rows += linear_rows(f"{own}.down", [f"{expert}.{down}"], (hidden, inner), bias=False)
    rows += linear_rows(f"{ours}.router", [f"{theirs}.gate"], (model.num_experts or 0, hidden), bias=False)
    return rows


def _class_name_of(family: str) -> Any:
    def class_name(components: frozenset[Component]) -> str:
        return f"{family}ForCausalLM"

    return class_name


# --- Mixtral ----------------------------------------------------------------------------------------------------------


def _mixtral_to_model(hf: HfConfig) -> ModelConfig:
    hf.expect("sliding_window", None)
    return resolve_model(
        GivenModel(
            **_given(hf),
            num_experts=hf.integer("num_local_experts", 8),
            moe_router_topk=hf.integer("num_experts_per_tok", 2),
            moe_input_jitter_eps=hf.number("router_jitter_noise", 0.0),
        )
    )


def _mixtral_to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **_there(model),
        "intermediate_size": model.expert_ffn_hidden_size,
        "router_jitter_noise": model.moe_input_jitter_eps,
    }


def _mixtral_misfits(model: ModelConfig) -> list[str]:
    found = _misfits(model, qk_layernorm=False, moe_router_pre_softmax=False)
    if model.has_experts and model.num_expert_layers < model.num_layers:
        found.append(f"moe_layer_freq {model.moe_layer_freq} (there only experts in all layers)")
    return found


def _mixtral_rows(model: ModelConfig, num_classes: int) -> list[TensorRule]:
    rows = end_rows(model)
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        rows += attention_rows(model, ours, theirs)
        rows += _expert_rows(model, f"{ours}.mlp", f"{theirs}.block_sparse_moe", ("w1", "w3", "w2"))
    return rows


MIXTRAL = Family(
    model_type="mixtral",
    prefix="model.",
    to_model=_mixtral_to_model,
    to_hf=_mixtral_to_hf,
    misfits=_mixtral_misfits,
    rows=_mixtral_rows,
    class_name=_class_name_of("Mixtral"),
    for_training=_FOR_TRAINING,
    derived=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)


# --- Qwen3 ------------------------------------------------------------------------------------------------------------


def _qwen3_to_model(hf: HfConfig) -> ModelConfig:
    hf.expect("use_sliding_window", False)
    layers, every = hf.integer("num_hidden_layers"), hf.integer("decoder_sparse_step", 1)
    dense = hf.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(one, int) for one in dense):
        raise CheckpointError(f"{hf.path}: mlp_only_layers is {dense!r:.60} and must be a list of layers; correct it")
    experts = "num_experts" if "num_experts" in hf.values else "num_local_experts"
    has_experts = [int(layer not in dense and (layer + 1) % every == 0) for layer in range(layers)]
    return resolve_model(
        GivenModel(
            **_given(hf),
            qk_layernorm=True,
            num_experts=hf.integer(experts, 128),
            moe_layer_freq="1" if all(has_experts) else str(has_experts).replace(" ", ""),
            moe_router_topk=hf.integer("num_experts_per_tok", 8),
            moe_router_pre_softmax=not hf.flag("norm_topk_prob", False),
            moe_ffn_hidden_size=hf.integer("moe_intermediate_size", 768),
        )
    )


def _qwen3_to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **_there(model),
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "intermediate_size": model.ffn_hidden_size,
        "mlp_only_layers": [layer for layer in range(model.num_layers) if not model.experts_of(layer)],
        "moe_intermediate_size": model.expert_ffn_hidden_size,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "num_experts": model.num_experts,
        "use_sliding_window": False,
    }


def _qwen3_misfits(model: ModelConfig) -> list[str]:
    return _misfits(model, qk_layernorm=True)


def _qwen3_rows(model: ModelConfig, num_classes: int) -> list[TensorRule]:
    rows = end_rows(model)
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        rows += attention_rows(model, ours, theirs)
        for one in ("query", "key"):
            norm = f"{theirs}.self_attn.{one[0]}_norm"
            rows += norm_rows(f"{ours}.attention.{one}_norm", norm, model.kv_channels, bias=False)
        if model.experts_of(layer):
            rows += _expert_rows(model, f"{ours}.mlp", f"{theirs}.mlp", ("gate_proj", "up_proj", "down_proj"))
        else:
            rows += mlp_rows(model, ours, theirs)
    return rows


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    prefix="model.",
    to_model=_qwen3_to_model,
    to_hf=_qwen3_to_hf,
    misfits=_qwen3_misfits,
    rows=_qwen3_rows,
    class_name=_class_name_of("Qwen3Moe"),
    for_training=_FOR_TRAINING,
    derived=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)
