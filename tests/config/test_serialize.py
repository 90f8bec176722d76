"""A run survives JSON exactly, and its table shows what differs from the defaults."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.derive import derive_model
from megatron3d.config.field_types import wanted_type
from megatron3d.config.options import OPTIONS, SECTIONS, Option, Settings
from megatron3d.config.run import GivenRun, RunConfig
from megatron3d.config.sections.parallel import GivenParallel
from megatron3d.config.serialize import as_table, from_dict, to_dict, to_json
from megatron3d.errors import ConfigError
from megatron3d.inference.load import generation_config
from tests.files.mutations import mutated_values

SMALL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --lr 1e-3 "
    "--train-samples 900 --vocab-size 100 --mock-data --swiglu --step-batch-size-schedule 0:4,1K:8 "
    "--disable-bias-linear"
)


def parse(line: str) -> GivenRun:
    return parse_args(line.split(), program="t", description="t", log=print)


def values_of(option: Option) -> st.SearchStrategy[Any]:
    """Values the option's field can hold."""
    if option.flag.choices:
        return st.sampled_from(option.flag.choices)
    if option.flag.kind == "list":
        return st.lists(st.text(min_size=1, max_size=5), max_size=4).map(tuple)
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "int": st.integers(-(10**12), 10**12),
        "float": st.floats(allow_nan=False, allow_infinity=False),
        "str": st.text(max_size=8),
        "bool": st.booleans(),
    }
    return kinds[option.type_name]


def run_of(values: Settings) -> RunConfig:
    """A run with any values, whether or not they fit together."""
    of = {section: {name: value for (where, name), value in values.items() if where == section} for section in SECTIONS}
    run = RunConfig(**{section: config_class(**of[section]) for section, config_class in SECTIONS.items()})
    # Values that may be None and that follow from others, which every resolved run has.
    names = ("num_experts", "rotary_scaling_factor", "rotary_original_max_position_embeddings")
    derived, given = vars(derive_model(run.model)), vars(run.model)
    missing = {name: derived[name] for name in names if given[name] is None}
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **missing))


REQUIRED = {
    (section, field.name)
    for section, config_class in SECTIONS.items()
    for field in dataclasses.fields(config_class)
    if field.default is dataclasses.MISSING
}
runs = st.fixed_dictionaries(
    {option.key: values_of(option) for option in OPTIONS if option.key in REQUIRED},
    optional={option.key: values_of(option) for option in OPTIONS if option.key not in REQUIRED},
).map(run_of)


@given(runs)
def test_a_run_survives_json(config: RunConfig) -> None:
    assert from_dict(json.loads(to_json(config))) == config


def test_every_field_of_every_section_is_stored() -> None:
    stored = to_dict(resolve(parse(SMALL), 2))
    assert list(stored) == [*SECTIONS, "as_given"]
    for section, config_class in SECTIONS.items():
        assert list(stored[section]) == [field.name for field in dataclasses.fields(config_class)]


@pytest.mark.parametrize("experts", ["", " --num-experts 4 8"])
def test_a_resolved_run_survives_json(experts: str) -> None:
    run = resolve(parse(SMALL + experts), 2)
    assert run.train.batch_size_steps == ((0, 4), (31, 8))
    assert from_dict(json.loads(to_json(run))) == run


def test_run_json_as_a_config_file_repeats_the_run(tmp_path: Path) -> None:
    run = resolve(parse(SMALL), 2)
    file = tmp_path / "run.json"
    file.write_text(to_json(run))
    assert resolve(parse(f"--config {file}"), 2) == run


def test_fields_of_an_older_run_take_their_defaults() -> None:
    run = resolve(parse(SMALL), 2)
    stored = to_dict(run)
    del stored["checkpoint"], stored["data"]["short_seq_prob"], stored["optim"]["muon_momentum"]
    del stored["model"]["num_token_types"], stored["train"]["batch_size_steps"]
    assert from_dict(stored) == dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size_steps=()))


def test_imported_weights_have_no_learning_rate() -> None:
    run = resolve(parse(SMALL), 2)
    stored = to_dict(run)
    stored["optim"]["lr"] = None
    assert from_dict(stored) == dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=0.0))


@pytest.mark.parametrize("architecture", ["bert", "nope", "my.py"])
def test_an_architecture_that_is_named_and_not_stored_is_refused(architecture: str) -> None:
    stored = to_dict(resolve(parse(SMALL), 2))
    with pytest.raises(
        ConfigError, match=f"architecture gpt, but the command names --architecture {architecture}; leav"
    ):
        from_dict(stored, architecture=architecture)
    assert from_dict(stored, architecture="gpt") == from_dict(stored)


def test_a_stored_run_without_a_size_that_nothing_gives_is_refused() -> None:
    stored = to_dict(resolve(parse(SMALL), 2))
    stored["model"]["hidden_size"] = None
    with pytest.raises(ConfigError, match="damaged or written by another program: --hidden-size"):
        from_dict(stored)


@pytest.mark.parametrize(
    ("stored", "named"),
    [({"modl": {}}, "modl"), ({"model": {"depth": 3}}, "model.depth"), ({"model": 3}, "model")],
)
def test_unknown_names_are_refused(stored: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_dict(stored)


def test_infinite_numbers_cannot_be_stored() -> None:
    with pytest.raises(ValueError):
        run = resolve(parse(SMALL), 2)
        to_json(dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=float("inf"))))


def test_the_table_shows_what_differs_and_what_is_derived() -> None:
    lines = as_table(resolve(parse(SMALL), 2)).split("\n")
    words = {tuple(line.split()) for line in lines}
    assert ("num_layers", "2") in words
    assert ("ffn_hidden_size", "128") in words
    assert ("data_parallel_size", "2") in words
    assert ("precision", "fp32") in words
    assert ("train_samples", "900", "samples") in words
    assert not any("rotary_base" in line for line in lines)
    assert [line for line in lines if not line.startswith(" ")] == [
        s for s in SECTIONS if s not in ("curriculum", "lengths", "checkpoint")
    ]


def test_every_field_has_a_type_that_stored_values_are_compared_with() -> None:
    for config_class in SECTIONS.values():
        for field in dataclasses.fields(config_class):
            assert wanted_type(field, object()) is not None
            if field.default is not dataclasses.MISSING:
                assert wanted_type(field, field.default) is None, field.name


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"model": {"num_layers": "3"}}, "model.num_layers is '3', not a whole number"),
        ({"model": {"num_layers": True}}, "model.num_layers is True, not a whole number"),
        ({"model": {"num_layers": 3.0}}, "model.num_layers is 3.0, not a whole number"),
        ({"model": {"num_layers": 10**30}}, "not a whole number"),
        ({"model": {"swiglu": 1}}, "model.swiglu is 1, not true or false"),
        ({"model": {"hidden_dropout": None}}, "model.hidden_dropout is None, not a finite number"),
        ({"optim": {"lr": math.nan}}, "optim.lr is nan, not a finite number"),
        ({"data": {"vocab_file": ["a"]}}, r"data.vocab_file is \('a',\), not a string"),
        ({"data": {"data_path": "a"}}, "data.data_path is 'a', not a list of strings"),
        ({"train": {"batch_size_steps": [[0, 4, 1]]}}, "not a list of pairs of whole numbers"),
        ({"model": {"num_layers": "3", "swiglu": 1}}, "num_layers .*; model.swiglu"),
    ],
)
def test_a_stored_value_of_another_type_is_named(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(stored)


@settings(max_examples=300, deadline=None)
@given(changed=mutated_values(to_dict(resolve(parse(SMALL), 2))))
def test_a_changed_run_json_is_read_or_refused(changed: Any) -> None:
    with contextlib.suppress(ConfigError):
        generation_config(from_dict(changed), GivenParallel(device="cpu"), world_size=1, bf16=False)
