"""The tables of names and layouts agree with the models that are built, and lose nothing on the way there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.derive import resolve_model
from megatron3d.config.placeholders import untrained_run
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.convert.families import FAMILIES, family_of
from megatron3d.convert.family import HfConfig
from megatron3d.convert.rows import TensorRule, convert
from megatron3d.errors import ConfigError
from megatron3d.models.zoo import architecture_of
from megatron3d.train.setup import build_model


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
    unsaid |= {"hidden_dropout"} if family.model_type == "llama" else set()
    unsaid |= {"num_token_types"} if model.num_token_types == 0 else set()
    unsaid |= {"swiglu"}
    differing = {n: (v, vars(again)[n]) for n, v in vars(model).items() if v != vars(again)[n] and n not in unsaid}
    assert not differing


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
