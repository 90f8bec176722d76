"""An architecture is one record, the project's or one from a user's own file, and a stored run runs no code unasked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import read_document
from megatron3d.config.architectures import ARCHITECTURES, ModelTraits, load_architecture
from megatron3d.config.check import model_problems
from megatron3d.config.cli import read_command
from megatron3d.config.derive import derive, resolve_model
from megatron3d.config.presets import PRESETS
from megatron3d.config.run import GivenRun
from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.train import GivenTrain
from megatron3d.config.serialize import AS_GIVEN, from_dict, to_dict
from megatron3d.convert.export import ExportOptions, export_model
from megatron3d.convert.families import FAMILIES, family_of
from megatron3d.errors import ConfigError
from megatron3d.files.user_code import code_digest
from megatron3d.models.counts import declared_specs, num_parameters
from megatron3d.models.zoo import ZOO, Architecture, architecture_of
from tests.runs import harness
from tools import estimate, verify_checkpoint

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
WRONG = Architecture(
    ModelTraits(
        "", "token", 1, "swish", frozenset({"qk_layernorm"}), hf_families=("gpt-5",), presets=("gpt3",)
    ),
    None,
    build_classifier=build_gpt_stage,
)
UNTYPED = Architecture(ModelTraits(7, own_options=("norm_position",), hf_families="gpt2"), lambda config: None)
WITHOUT = Architecture("GPT", build_gpt_stage)
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
    assert problem.startswith(f"--num-token-types 2 means nothing to the model of --architecture {mine}:PLAIN;")


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
        ("{folder}/mine.py:NONE", "has no Architecture 'NONE'; it has BARE, OF_HF, PLAIN, UNTYPED, WITHOUT, WRONG."),
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


WRONG_FIELDS = {
    "BARE": ["it is a DescribedArchitecture, which builds no layers; make it a megatron3d.models.zoo.Architecture."],
    "WITHOUT": ["traits is 'GPT'; use a megatron3d.config.architectures.ModelTraits."],
    "WRONG": [
        "title of its traits is ''; use a text that is not empty.",
        "samples of its traits is 'token'; use one of tokens, sentences.",
        "is_causal of its traits is 1; use True or False.",
        "activation of its traits is 'swish'; use one of gelu, gelu_tanh, relu, squared_relu, silu, swiglu, geglu, "
        "reglu.",
        "own_options of its traits is frozenset({'qk_layernorm'}); use a frozenset of none or some of "
        "bert_binary_head, norm_position, num_experts, num_token_types.",
        "hf_families of its traits is ('gpt-5',); use a tuple of none or some of gpt2, mistral, qwen2, qwen3, llama, "
        "mixtral, qwen2_moe, qwen3_moe, olmoe, bert, megatron-bert.",
        "presets of its traits is ('gpt3',); use (), since only the project's own architectures have presets.",
        "build_stage is None; use a function that is called with (config, train, part, context).",
        "build_classifier cannot be called with (config, train, part, context, num_outputs=...): got an unexpected "
        "keyword argument 'num_outputs'; change what it takes.",
    ],
    "UNTYPED": [
        "title of its traits is 7; use a text that is not empty.",
        "own_options of its traits is ('norm_position',); use a frozenset of none or some of bert_binary_head, "
        "norm_position, num_experts, num_token_types.",
        "hf_families of its traits is 'gpt2'; use a tuple of none or some of gpt2, mistral, qwen2, qwen3, llama, "
        "mixtral, qwen2_moe, qwen3_moe, olmoe, bert, megatron-bert.",
        "build_stage cannot be called with (config, train, part, context): too many positional arguments; change what "
        "it takes.",
    ],
}


@pytest.mark.parametrize(("name", "wrong"), WRONG_FIELDS.items())
def test_all_fields_without_a_meaning_are_refused_at_once_beside_other_problems(
    mine: Path, name: str, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--architecture", f"{mine}:{name}", "--num-layer", "2"]
    problems = read_command(argv, program="pretrain_gpt.py", description="", log=no_lines).problems
    assert [problem for problem in problems if "--num-layer" not in problem] == [
        f"--architecture {mine}:{name}: {one}" for one in wrong
    ]
    assert len(problems) == len(wrong) + 1
    assert estimate.main(argv) == 2
    assert set(problems) <= set(capsys.readouterr().err.splitlines())


def no_lines(line: str) -> None:
    """Take a line for the user, who is not there."""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise ValueError('Of mine.')", "ValueError: Of mine"),
        (
            "from megatron3d.config.architectures import ModelTraits as M\nM()",
            "TypeError: ModelTraits.__init__() missing 1",
        ),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_sentence_about_code_that_cannot_be_loaded_has_one_full_stop(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_architecture(f"{path}:X")
    sentence = str(caught.value)
    assert f"broken.py cannot be loaded: {reason}" in sentence
    assert sentence.endswith("; mend the file.") and ".;" not in sentence


def test_a_path_means_one_architecture_however_it_is_written(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine.parent)
    named = {
        read_command(
            ["--architecture", f"{path}:PLAIN"], program="pretrain_gpt.py", description="", log=no_lines
        ).run.model.architecture
        for path in ("mine.py", "./mine.py", f"../{mine.parent.name}/mine.py", mine)
    }
    assert named == {f"{mine}:PLAIN"}


@pytest.mark.parametrize("version", ["of now", "without as_given"])
def test_a_command_prints_which_file_it_runs_before_it_does_and_who_named_it(
    mine: Path, tmp_path: Path, version: str
) -> None:
    stored = to_dict(derive(GivenRun(model=TINY, train=GivenTrain(micro_batch_size=1, train_iters=1)), 1))
    stored["model"]["architecture"] = f"{mine}:PLAIN"
    if version == "without as_given":
        del stored[AS_GIVEN]
    file, ran = tmp_path / "run.json", mine.with_suffix(".ran")
    file.write_text(json.dumps(stored))
    lines: list[tuple[str, bool]] = []

    def problems(*words: str) -> tuple[str, ...]:
        return read_command(
            words, program="pretrain_gpt.py", description="", log=lambda line: lines.append((line, ran.exists()))
        ).problems

    assert problems("--config", str(file), "--architecture", "gpt") == ()
    assert lines == [] and not ran.exists()
    assert problems("--config", str(file)) == ()
    assert ran.exists()
    assert problems("--architecture", f"{mine}:OF_HF") == ()
    assert lines == [
        (f"--config {file}: --architecture {mine}:PLAIN is code, which is run.", False),
        (f"--architecture {mine}:OF_HF is code, which is run.", True),
    ]


def test_an_order_of_ones_own_has_its_path_too(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine.parent)
    words, lines = ["--pipeline-schedule", "mine.py:order"], list[str]()
    run = read_command(words, program="pretrain_gpt.py", description="", log=lines.append).run
    assert run.parallel.pipeline_schedule == f"{mine}:order"
    assert lines == [f"--pipeline-schedule {mine}:order is code, which is run."]


@pytest.mark.parametrize("module", [False, True])
def test_the_digest_is_that_of_the_file(mine: Path, monkeypatch: pytest.MonkeyPatch, module: bool) -> None:
    monkeypatch.syspath_prepend(mine.parent)
    name = f"{'mine' if module else mine}:PLAIN"
    assert code_digest(name) == hashlib.sha256(MINE.encode()).hexdigest()
    with pytest.raises(ConfigError, match="cannot be read"):
        code_digest(f"none{name}")


def test_a_stored_run_runs_no_code_that_the_command_does_not_name(mine: Path) -> None:
    train = GivenTrain(micro_batch_size=1, train_iters=1)
    stored = to_dict(derive(GivenRun(model=TINY, train=train), 1))
    stored["model"]["architecture"] = f"{mine}:PLAIN"
    for named in (None, "gpt"):
        with pytest.raises(ConfigError, match="run only where the command names it"):
            from_dict(stored, architecture=named)
    with pytest.raises(ConfigError, match=f"but the command names --architecture {mine}:OF_HF; give --architecture"):
        from_dict(stored, architecture=f"{mine}:OF_HF")
    assert not mine.with_suffix(".ran").exists()
    stored["model"]["architecture"] = "elsewhere/mine.py:PLAIN"  # as it was called where the run was stored
    assert from_dict(stored, architecture=f"{mine}:PLAIN").model.traits.title == "plain GPT"
    assert mine.with_suffix(".ran").exists()


def test_an_architecture_that_a_stored_run_does_not_have_is_refused() -> None:
    stored = to_dict(derive(GivenRun(model=TINY, train=GivenTrain(micro_batch_size=1, train_iters=1)), 1))
    with pytest.raises(ConfigError, match=r"has the architecture gpt, but the command names --architecture nope\.py:X"):
        from_dict(stored, architecture="nope.py:X")


def test_a_resume_names_code_that_changed_or_moved_and_resumes(mine: Path, tmp_path: Path) -> None:
    save, moved = tmp_path / "save", tmp_path / "moved" / "mine.py"
    words = (harness.MOCK, "--save", save, "--train-iters")
    harness.run_ok(*words, "1 --architecture", f"{mine}:PLAIN")
    moved.parent.mkdir()
    moved.write_text(MINE)
    ended = harness.run_ok(*words, "2 --override-opt-param-scheduler --architecture", f"{moved}:PLAIN")
    assert f"{mine}:PLAIN has moved to {moved}:PLAIN, with the same content" in ended.out
    assert "changed: the code" not in ended.out
    mine.write_text(f"{MINE}\n# changed")
    ended = harness.run_ok(*words, "3 --override-opt-param-scheduler --architecture", f"{mine}:PLAIN")
    (line,) = [line for line in ended.log if line.startswith("changed: the code of --architecture: checkpoint ")]
    assert f"{moved}:PLAIN (" in line and f", this run {mine}:PLAIN (" in line
    for path in (mine, moved):
        path.unlink()
    assert verify_checkpoint.main([str(save)]) == 0


def test_a_model_is_exported_as_the_family_its_architecture_names_and_refused_without_one(mine: Path) -> None:
    model = resolve_model(replace(TINY, architecture=f"{mine}:OF_HF"))
    rows = [row for row in family_of(model).rows(model, 2) if row.ours is not None]
    assert {row.ours: row.shape for row in rows} == {spec.name: spec.shape for spec in declared_specs(model)}
    with pytest.raises(ConfigError, match=r"what the model of --architecture .*PLAIN computes"):
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
