"""The tables of names and layouts agree with the models that are built, and lose nothing on the way there and back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.derive import resolve_model
from megatron3d.config.placeholders import untrained_run
from megatron3d.config.rotary import rotary_attention_factor
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.convert.families import FAMILIES, family_of
from megatron3d.convert.family import HfConfig
from megatron3d.convert.rows import TensorRule, convert
from megatron3d.errors import CheckpointError, ConfigError
from megatron3d.models.zoo import architecture_of
from megatron3d.train.setup import build_model

SCALINGS = (
    {},
    {"rotary_scaling": "linear", "rotary_scaling_factor": 3.0},
    {"rotary_scaling": "llama3", "rotary_low_freq_factor": 0.5, "rotary_original_max_position_embeddings": 2},
    {"position_embedding_type": "yarn", "rotary_original_max_position_embeddings": 2, "yarn_beta_slow": 0.5},
    {"position_embedding_type": "yarn", "rotary_original_max_position_embeddings": 2, "rotary_attention_factor": 1.5},
    {"position_embedding_type": "yarn", "rotary_original_max_position_embeddings": 2, "mscale_all_dim": 0.7},
)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Small models that some family takes."""
    kind = draw(st.sampled_from(sorted(FAMILIES)))
    heads = draw(st.sampled_from([1, 2, 4]))
    sizes = {
        "num_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "hidden_size": heads * draw(st.sampled_from([4, 8])),
        "ffn_hidden_size": draw(st.integers(1, 20)),
        "vocab_size": draw(st.integers(3, 40)),
        "seq_length": draw(st.integers(2, 9)),
        "untie_embeddings_and_output_weights": draw(st.booleans()),
    }
    if "bert" in kind:
        more = {"architecture": "bert", "norm_position": "pre" if kind == "megatron-bert" else "post"}
        more |= {"bert_binary_head": draw(st.booleans()), "num_token_types": draw(st.sampled_from([0, 1, 2, 3]))}
    elif kind == "gpt2":
        more = {"activation": draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "squared_relu", "silu"]))}
    else:
        more = {"position_embedding_type": "rope", "normalization": "RMSNorm", "rotary_base": 500.0}
        more |= {"activation": draw(st.sampled_from(["swiglu", "geglu", "reglu"]))}
        more |= {"add_bias_linear": draw(st.booleans()), "kv_channels": draw(st.sampled_from([4, 6]))}
        more |= {"num_query_groups": draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0]))}
        more |= draw(st.sampled_from(SCALINGS))
        if kind in ("mistral", "qwen2", "qwen3"):
            more |= {"add_bias_linear": False, "add_qkv_bias": kind == "qwen2", "qk_layernorm": kind == "qwen3"}
    return resolve_model(GivenModel(**sizes, **more))


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Full shapes of all parameters of the model that is built for training."""
    run = untrained_run(model)
    built = build_model(run, make_mesh(Layout()), torch.device("cpu"), architecture_of(model).build_stage)
    return {name: one.spec.shape for name, one in built.stages[0].parameters_by_name().items()}


@settings(max_examples=60, deadline=None)
@given(models())
def test_rows_name_every_parameter_of_the_built_model_once_with_its_shape(model: ModelConfig) -> None:
    rows = family_of(model).rows(model, 2)
    named = [row.ours for row in rows if row.ours is not None and row.component != "classes"]
    assert len(set(named)) == len(named)
    theirs = [name for row in rows for name in row.theirs]
    assert len(set(theirs)) == len(theirs)
    shapes = {row.ours: row.shape for row in rows}
    built = shapes_of(model)
    assert {name: shapes[name] for name in built} == built
    # What the tables have beyond the model are whole heads that this one was built without.
    assert all(name.startswith(("head.pooler.", "head.binary.")) for name in set(named) - built.keys())
    assert model.has_binary_head is False or not set(named) - built.keys()


@settings(max_examples=60, deadline=None)
@given(models(), st.integers(0, 2**31))
def test_tensors_there_and_back_are_the_same_bits(model: ModelConfig, seed: int) -> None:
    rows = [row for row in family_of(model).rows(model, 3) if row.ours is not None]
    generator = torch.Generator().manual_seed(seed)
    ours = {row.ours: torch.randn(row.shape, generator=generator) for row in rows}
    theirs = {name: tensor for row in rows for name, tensor in row.to_theirs(ours[row.ours]).items()}
    assert {name: tuple(t.shape) for name, t in theirs.items()} == {
        n: s for r in rows for n, s in r.shapes_there().items()
    }
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in ours.values())
    back = convert(rows, theirs)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


@settings(max_examples=60, deadline=None)
@given(models())
def test_the_shape_of_a_model_comes_back_from_its_config_json(model: ModelConfig) -> None:
    family = family_of(model)
    again = family.to_model(HfConfig(Path("config.json"), family.to_hf(model)))
    # What no config.json says: which heads there are, and how a length that only training knows was chosen.
    unsaid = {"bert_binary_head", "seq_length", "make_vocab_size_divisible_by"}
    unsaid |= {"hidden_dropout"} if model.position_embedding_type == "rope" else set()
    unsaid |= {"num_token_types"} if model.num_token_types == 0 else set()
    unsaid |= {"swiglu"}
    differing = {n: (v, vars(again)[n]) for n, v in vars(model).items() if v != vars(again)[n] and n not in unsaid}
    assert not differing


PLAIN = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}


def read(kind: str, **values: object) -> ModelConfig:
    """Our shape of a model that a `config.json` describes."""
    return FAMILIES[kind].to_model(HfConfig(Path("config.json"), PLAIN | values))


def test_scalings_as_earlier_versions_of_transformers_spell_them_are_the_same() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768}
    now = read("qwen2", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, **scaling})
    assert (now.rotary_scaling, now.rotary_base, now.rotary_scaling_factor) == ("yarn", 1e6, 4.0)
    assert read("qwen2", rope_theta=1e6, rope_scaling={"type": "yarn", **scaling}) == now
    outside = {"rope_type": "yarn", "original_max_position_embeddings": 8192, "factor": None}
    assert read("qwen2", rope_theta=1e6, rope_scaling=outside).rotary_scaling_factor == 4.0


def test_a_magnitude_of_megatron_lm_that_transformers_would_leave_out_is_written_as_a_number() -> None:
    """There `mscale` counts only beside `mscale_all_dim`."""
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 64, "vocab_size": 9}
    sizes |= {"normalization": "RMSNorm", "activation": "swiglu", "add_bias_linear": False}
    yarn = {"position_embedding_type": "yarn", "rotary_original_max_position_embeddings": 16, "mscale": 0.5}
    model = resolve_model(GivenModel(**sizes, **yarn))
    written = family_of(model).to_hf(model)["rope_parameters"]
    assert "mscale" not in written and written["attention_factor"] == rotary_attention_factor(model) > 1


def test_a_window_that_no_text_exceeds_bars_nothing() -> None:
    assert read("mistral", sliding_window=64, max_position_embeddings=64).max_position_embeddings == 64
    assert read("mistral", sliding_window=None).max_position_embeddings == 131072
    later = {"use_sliding_window": True, "sliding_window": 64, "max_position_embeddings": 128}
    assert read("qwen3", **later, max_window_layers=2).kv_channels == 128, "no layer has a window"
    everywhere = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    assert read("qwen2", **everywhere, max_position_embeddings=64).max_position_embeddings == 64


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("mistral", {"sliding_window": 4096}, "sliding_window 4096 is shorter than max_position_embeddings 131072"),
        ("mistral", {}, "set max_position_embeddings to the window"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding_window 4096 is shorter"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window 4096 is shorter"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "only full_attention and sliding_attention can"),
        ("qwen3", {"attention_bias": True}, "a model with attention_bias True"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "extend these by a fine-tuning"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "only default, linear, yarn and llama3 can"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "lacks factor; add it"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor 0.5 of the rotary scaling"),
        ("mixtral", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq_factor; add it"),
    ],
)
def test_positions_that_we_do_not_compute_are_refused_with_the_remedy(
    kind: str, values: dict[str, object], words: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read(kind, **values)


def test_a_fused_tensor_is_cut_where_its_parts_meet() -> None:
    row = TensorRule("qkv", ("q", "k", "v"), (4, 3), sizes=(2, 1, 1))
    parts = row.to_theirs(torch.arange(12.0).view(4, 3))
    assert [parts[name].tolist() for name in "qkv"] == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8]], [[9, 10, 11]]]


def test_a_transposed_tensor_lies_the_other_way() -> None:
    row = TensorRule("up", ("c_fc",), (2, 3), transposed=True)
    assert row.shapes_there() == {"c_fc": (3, 2)}
    there = row.to_theirs(torch.arange(6.0).view(2, 3))["c_fc"]
    assert there.tolist() == [[0, 3], [1, 4], [2, 5]] and there.is_contiguous()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalization": "RMSNorm"}, "gpt2, but here normalization RMSNorm"),
        ({"qk_layernorm": True}, "gpt2, but here qk_layernorm True"),
        (
            {"architecture": "bert", "position_embedding_type": "rope"},
            "megatron-bert, but here position_embedd",
        ),
    ],
)
def test_a_model_without_counterpart_is_refused_with_what_stands_in_the_way(
    options: dict[str, object], words: str
) -> None:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 4, "vocab_size": 9}
    model = resolve_model(GivenModel(**sizes, **options))
    with pytest.raises(ConfigError, match=words):
        family_of(model)
