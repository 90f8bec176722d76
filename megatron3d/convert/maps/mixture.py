"""Mixtures of experts like Llama in everything else: transformers' `mixtral`, `qwen2_moe`, `qwen3_moe` and `olmoe`.

    mixtral      experts in all layers; softmax over the chosen ones, so that a token's weights add up to one
    olmoe        experts in all layers; norms of the queries, and of the keys, of all heads together
    qwen2_moe    experts in some layers, and beside them a shared expert with a gate; biases of queries, keys and values
    qwen3_moe    experts in some layers; norms of each head's queries and keys

In all but the first `norm_topk_prob` says whether weights add up to one or are the scores as they are. Each of our
experts has its gate and up projection fused; the router is a matrix in both. The loss of balance there is one of all
layers together, and its coefficient is left to the options of the training here.

Source of names and layouts: transformers' `modeling_*.py` of these (5.24), beside which the tests run ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.convert.family import Family, HfConfig, gate_there, gated, option_misfits
from megatron3d.convert.maps.llama import attention_rows, end_rows, gated_rows, mlp_rows
from megatron3d.convert.rope_parameters import rope_fields, rotary_options
from megatron3d.convert.rows import Component, TensorRule, linear_rows, norm_rows
from megatron3d.errors import CheckpointError


@dataclass(frozen=True)
class _Kind:
    """How one of these families differs from the others.

    Attributes:
        model_type: as `config.json` calls it.
        name: how the names of its classes begin.
        defaults: of fields that a `config.json` may lack; a field that is not here and not the same for all, the
            family does not have.
        width: the field that has the inner width of an expert.
        module: the module of a layer that has the experts.
        projections: gate, up and down projection of an expert.
        qk_norms: whether queries and keys are normalised: not at all, those of each head, or of all heads together.
    """

    model_type: str
    name: str
    defaults: Mapping[str, Any]
    width: str = "moe_intermediate_size"
    module: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    qk_norms: str = "none"

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layers may have one MLP instead of experts."""
        return "decoder_sparse_step" in self.defaults

    @property
    def may_not_sum_to_one(self) -> bool:
        """Whether a token's weights may be the scores as they are."""
        return "norm_topk_prob" in self.defaults

    @property
    def has_shared(self) -> bool:
        """Whether there is a shared expert with a gate."""
        return "shared_expert_intermediate_size" in self.defaults

    @property
    def has_jitter(self) -> bool:
        """Whether the router may read its input with noise."""
        return "router_jitter_noise" in self.defaults

    @property
    def may_have_qkv_bias(self) -> bool:
        """Whether queries, keys and values may have biases."""
        return "qkv_bias" in self.defaults


_MIXTRAL = _Kind(
    "mixtral",
    "Mixtral",
    {
        **{"num_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        **{"router_jitter_noise": 0.0},
    },
    width="intermediate_size",
    module="block_sparse_moe",
    projections=("w1", "w3", "w2"),
)
_OLMOE = _Kind(
    "olmoe",
    "Olmoe",
    {
        **{"num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
        **{"max_position_embeddings": 4096, "norm_topk_prob": False},
    },
    width="intermediate_size",
    qk_norms="all",
)
_QWEN2_MOE = _Kind(
    "qwen2_moe",
    "Qwen2Moe",
    {
        **{"num_experts": 60, "num_experts_per_tok": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
        **{"norm_topk_prob": False, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
        **{"decoder_sparse_step": 1, "qkv_bias": True},
    },
)
_QWEN3_MOE = _Kind(
    "qwen3_moe",
    "Qwen3Moe",
    {
        **{"num_experts": 128, "num_experts_per_tok": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
        **{"norm_topk_prob": False, "moe_intermediate_size": 768, "decoder_sparse_step": 1},
    },
    qk_norms="each",
)
_FOR_TRAINING = (r"layers\.\d+\.mlp\.router\.previous",)  # of the loss of balance over the global batch


def _to_model(kind: _Kind, hf: HfConfig) -> ModelConfig:
    default = kind.defaults
    for field, allowed in (
        ("attention_bias", False),
        ("clip_qkv", None),
        ("use_sliding_window", False),
    ):
        hf.expect(field, allowed)
    if "decoder_sparse_step" not in default:  # the others keep a length there that they do not use
        hf.expect("sliding_window", None)
    heads, hidden = hf.integer("num_attention_heads"), hf.integer("hidden_size")
    positions = hf.integer("max_position_embeddings", default.get("max_position_embeddings", 32768))
    count = "num_experts" if "num_experts" in hf.values else "num_local_experts"
    has_shared = kind.has_shared
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
            **rotary_options(hf, positions=positions, default_base=default["rope_theta"]),
            normalization="RMSNorm",
            norm_epsilon=hf.number("rms_norm_eps", default["rms_norm_eps"]),
            activation=gated(hf.values.get("hidden_act", "silu"), hf),
            add_bias_linear=False,
            add_qkv_bias=kind.may_have_qkv_bias and hf.flag("qkv_bias", default["qkv_bias"]),
            qk_layernorm=kind.qk_norms != "none",
            qk_layernorm_across_heads=kind.qk_norms == "all",
            untie_embeddings_and_output_weights=not hf.flag("tie_word_embeddings", False),
            hidden_dropout=0.0,
            attention_dropout=hf.number("attention_dropout", 0.0),
            init_method_std=hf.number("initializer_range", 0.02),
            num_experts=hf.integer(count, default["num_experts"]),
            moe_layer_freq=_layers_there(hf) if kind.has_dense_layers else "1",
            moe_router_topk=hf.integer("num_experts_per_tok", default["num_experts_per_tok"]),
            moe_router_pre_softmax=kind.may_not_sum_to_one and not hf.flag("norm_topk_prob", default["norm_topk_prob"]),
            moe_ffn_hidden_size=hf.integer(kind.width, default.get(kind.width)),
            moe_input_jitter_eps=hf.number("router_jitter_noise", 0.0) if kind.has_jitter else 0.0,
            moe_shared_expert_intermediate_size=(
                hf.integer("shared_expert_intermediate_size", default["shared_expert_intermediate_size"])
                if has_shared
                else None
            ),
            moe_shared_expert_gate=has_shared,
        )
    )


def _layers_there(hf: HfConfig) -> str:
    """Which layers have experts, as the value of `--moe-layer-freq`. Raises: CheckpointError for no list of layers."""
    layers, every = hf.integer("num_hidden_layers"), hf.integer("decoder_sparse_step", 1)
    dense = hf.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(one, int) for one in dense):
        raise CheckpointError(f"{hf.path}: mlp_only_layers is {dense!r:.60} and must be a list of layers; correct it")
    has_experts = [int(layer not in dense and (layer + 1) % every == 0) for layer in range(layers)]
    return "1" if all(has_experts) else str(has_experts).replace(" ", "")


def _to_hf(kind: _Kind, model: ModelConfig) -> dict[str, Any]:
    values = {
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
        "head_dim": model.kv_channels,
        "hidden_act": gate_there(model.activation),
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_attention_heads,
        "num_experts_per_tok": model.moe_router_topk,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        # Which of the two is read depends on the family and on the version of transformers.
        "num_experts": model.num_experts,
        "num_local_experts": model.num_experts,
        "rms_norm_eps": model.norm_epsilon,
        **rope_fields(model),
        "sliding_window": None,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
        kind.width: model.expert_ffn_hidden_size,
    }
    if kind.has_dense_layers:
        values["decoder_sparse_step"] = 1
        values["mlp_only_layers"] = [layer for layer in range(model.num_layers) if not model.experts_of(layer)]
        values["use_sliding_window"] = False
    if kind.has_jitter:
        values["router_jitter_noise"] = model.moe_input_jitter_eps
    if kind.may_not_sum_to_one:
        values["norm_topk_prob"] = not model.moe_router_pre_softmax
    if kind.may_have_qkv_bias:
        values["qkv_bias"] = model.add_qkv_bias
    if kind.has_shared:
        values["shared_expert_intermediate_size"] = model.moe_shared_expert_intermediate_size
    return values


def _misfits(kind: _Kind, model: ModelConfig) -> list[str]:
    found = option_misfits(
        model,
        {
            "normalization": "RMSNorm",
            "position_embedding_type": "rope",
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "activation": ("swiglu", "geglu", "reglu"),
            "add_bias_linear": False,
            "add_qkv_bias": (True, False) if kind.may_have_qkv_bias else False,
            "qk_layernorm": kind.qk_norms != "none",
            "qk_layernorm_across_heads": kind.qk_norms == "all",
            "apply_residual_connection_post_layernorm": False,
            "num_experts_by_layer": ((),),
            "mlp_type": "standard",
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": (True, False) if kind.may_not_sum_to_one else False,
            "moe_router_num_groups": None,
            "moe_router_topk_scaling_factor": None,
            "moe_shared_expert_gate": kind.has_shared,
            "moe_expert_capacity_factor": None,
            "moe_router_force_load_balancing": False,
        },
    )
    if not model.has_experts:
        return [*found, f"num_experts {model.num_experts} (there only 2 or more)"]
    if bool(model.moe_shared_expert_intermediate_size) != kind.has_shared:
        there = "some" if kind.has_shared else "None"
        found.append(
            f"moe_shared_expert_intermediate_size {model.moe_shared_expert_intermediate_size} (there only {there})"
        )
    if model.num_expert_layers < model.num_layers and not kind.has_dense_layers:
        found.append(f"moe_layer_freq {model.moe_layer_freq} (there only experts in all layers)")
    if kind.qk_norms == "all" and model.kv_channels * model.num_attention_heads != model.hidden_size:
        found.append(f"kv_channels {model.kv_channels} (there only hidden_size / num_attention_heads)")
    return found


def _rows(kind: _Kind, model: ModelConfig, num_classes: int) -> list[TensorRule]:
    rows = end_rows(model)
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        rows += attention_rows(model, ours, theirs)
        heads = {"query": model.num_attention_heads, "key": model.num_query_groups}
        for one, count in heads.items() if kind.qk_norms != "none" else ():
            size = model.kv_channels * (count if kind.qk_norms == "all" else 1)
            norm = f"{theirs}.self_attn.{one[0]}_norm"
            rows += norm_rows(f"{ours}.attention.{one}_norm", norm, size, bias=False)
        if model.experts_of(layer):
            rows += _expert_rows(kind, model, f"{ours}.mlp", f"{theirs}.{kind.module}")
        else:
            rows += mlp_rows(model, ours, theirs)
    return rows


def _expert_rows(kind: _Kind, model: ModelConfig, ours: str, theirs: str) -> list[TensorRule]:
    """The experts of a layer, its router, and the shared expert where there is one."""
    hidden, inner, experts = model.hidden_size, model.expert_ffn_hidden_size, model.num_experts or 0
    rows = []
    for number in range(experts):
        names = [f"{theirs}.experts.{number}.{one}" for one in kind.projections]
        rows += gated_rows(f"{ours}.experts.{number}", names, hidden, inner)
    rows += linear_rows(f"{ours}.router", [f"{theirs}.gate"], (experts, hidden), bias=False)
    if kind.has_shared:
        names = [f"{theirs}.shared_expert.{one}" for one in kind.projections]
        rows += gated_rows(f"{ours}.shared", names, hidden, model.moe_shared_expert_intermediate_size or 0)
        rows += linear_rows(f"{ours}.shared_gate", [f"{theirs}.shared_expert_gate"], (1, hidden), bias=False)
    return rows


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
        for_training=_FOR_TRAINING,
        derived=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )


MIXTURES = tuple(_family(kind) for kind in (_MIXTRAL, _QWEN2_MOE, _QWEN3_MOE, _OLMOE))
