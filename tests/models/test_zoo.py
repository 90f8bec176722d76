"""An architecture is one record, the project's or one from a user's own file, and a stored run runs no code unasked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import read_document
from megatron3d.config.architectures import ARCHITECTURES, ModelTraits
from megatron3d.config.check import model_problems
from megatron3d.config.cli import read_command
from megatron3d.config.derive import derive, resolve_model
from megatron3d.config.presets import PRESETS
from megatron3d.config.run import GivenRun
from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.train import GivenTrain
from megatron3d.config.serialize import from_dict, to_dict
from megatron3d.convert.export import ExportOptions, export_model
from megatron3d.convert.families import FAMILIES, family_of
from megatron3d.errors import ConfigError
from megatron3d.models.counts import declared_specs, num_parameters
from megatron3d.models.zoo import ZOO, Architecture, architecture_of
from tests.runs import harness

TINY = GivenModel(num_layers=2, hidden_size=8, num_attention_heads=2, seq_length=4, vocab_size=11)
MINE = """
from pathlib import Path

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import read_document
from megatron3d.config.architectures import DescribedArchitecture, ModelTraits
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.models.zoo import Architecture

Path(__file__).with_suffix(".ran").touch()
TRAITS = ModelTraits("plain GPT", activation="relu", own_options=frozenset({"norm_position"}))
PLAIN = Architecture(TRAITS, build_gpt_stage)
OF_HF = Architecture(ModelTraits("GPT of mine", hf_families=("gpt2",)), build_gpt_stage)
BARE = DescribedArchitecture(ModelTraits("nothing"))
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's file with architectures, which leaves a mark when it is run."""
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_every_architecture_has_layers_and_every_family_and_preset_belongs_to_one() -> None:
    assert ZOO.keys() == ARCHITECTURES.keys()
    assert all(record.traits is ARCHITECTURES[name] for name, record in ZOO.items())
    families = [family for traits in ARCHITECTURES.values() for family in traits.hf_families]
    assert sorted(families) == sorted(FAMILIES)
    for name, traits in ARCHITECTURES.items():
        its = {preset for preset, row in PRESETS.items() if row.model_config().architecture == name}
        assert all(any(preset.startswith(begin) for preset in its) for begin in traits.presets)


def test_an_architecture_of_a_users_file_decides_what_the_projects_own_do(mine: Path) -> None:
    model = resolve_model(replace(TINY, architecture=f"{mine}:PLAIN"))
    assert (model.traits.title, model.activation, model.is_causal) == ("plain GPT", "relu", True)
    assert isinstance(architecture_of(model), Architecture)
    assert num_parameters(model) == num_parameters(resolve_model(TINY))
    (problem,) = model_problems(replace(model, norm_position="post", num_token_types=2))
    assert problem.startswith("--num-token-types 2 means nothing to a plain GPT")


def test_a_program_takes_every_architecture_that_learns_from_its_samples(mine: Path) -> None:
    words = ["--architecture", f"{mine}:PLAIN"]
    assert read_command(words, program="pretrain_gpt.py", description="").problems == ()
    (problem,) = read_command(words, program="pretrain_bert.py", description="", architecture="bert").problems
    assert problem.startswith("pretrain_bert.py trains a BERT")
    assert problem.endswith("PLAIN; use pretrain_gpt.py.")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{folder}/none.py:PLAIN", "there is no file {folder}/none.py"),
        ("{folder}/mine.py:NONE", "has no Architecture 'NONE'; it has BARE, OF_HF, PLAIN"),
        ("{folder}/mine.py:", "names no Architecture"),
        ("t5", "is not one of its choices; use one of: gpt, bert"),
        ("no_such_module:X", "module 'no_such_module' cannot be imported"),
    ],
)
def test_an_architecture_that_is_not_there_is_one_problem_among_all(mine: Path, name: str, words: str) -> None:
    name, words = (text.format(folder=mine.parent) for text in (name, words))
    argv = ["--architecture", name, "--num-layer", "2"]
    problems = read_command(argv, program="pretrain_gpt.py", description="").problems
    assert len(problems) == 2 and any(words in problem for problem in problems), problems
    assert any("did you mean --num-layers" in problem for problem in problems)


def test_a_record_without_layers_is_refused(mine: Path) -> None:
    with pytest.raises(ConfigError, match="builds no layers; make it a"):
        architecture_of(resolve_model(replace(TINY, architecture=f"{mine}:BARE")))


def test_a_stored_run_runs_no_code_that_the_command_does_not_name(mine: Path) -> None:
    train = GivenTrain(micro_batch_size=1, train_iters=1)
    stored = to_dict(derive(GivenRun(model=TINY, train=train), 1))
    stored["model"]["architecture"] = f"{mine}:PLAIN"
    for named in (None, "gpt", f"{mine}:OF_HF"):
        with pytest.raises(ConfigError, match="run only where the command names it"):
            from_dict(stored, architecture=named)
    assert not mine.with_suffix(".ran").exists()
    assert from_dict(stored, architecture=f"{mine}:PLAIN").model.traits.title == "plain GPT"
    assert mine.with_suffix(".ran").exists()


def test_a_model_is_exported_as_the_family_its_architecture_names_and_refused_without_one(mine: Path) -> None:
    model = resolve_model(replace(TINY, architecture=f"{mine}:OF_HF"))
    rows = [row for row in family_of(model).rows(model, 2) if row.ours is not None]
    assert {row.ours: row.shape for row in rows} == {spec.name: spec.shape for spec in declared_specs(model)}
    with pytest.raises(ConfigError, match="what a plain GPT computes"):
        family_of(resolve_model(replace(TINY, architecture=f"{mine}:PLAIN")))
    with pytest.raises(ConfigError, match="gpt2, but here normalization RMSNorm"):
        family_of(replace(model, normalization="RMSNorm"))


def test_a_checkpoint_of_a_users_architecture_is_exported_where_it_is_named(mine: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    name, save = f"{mine}:OF_HF", tmp_path / "save"
    harness.run_ok(harness.MOCK, "--train-iters 1 --architecture", name, "--save", save)
    checkpoint = find_checkpoint(save, None)
    with pytest.raises(ConfigError, match="run only where the command names it"):
        export_model(checkpoint, tmp_path / "unnamed")
    export_model(checkpoint, tmp_path / "hf", ExportOptions(architecture=name))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(exported).__name__ == "GPT2LMHeadModel"
    model = from_dict(read_document(checkpoint, "run"), architecture=name).model
    assert exported.num_parameters() == num_parameters(model)


def test_the_defaults_of_traits_are_those_of_a_decoder() -> None:
    traits = ModelTraits("mine")
    assert (traits.script, traits.is_causal, traits.own_options) == ("pretrain_gpt.py", True, frozenset())
