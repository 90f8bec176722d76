"""The command line: layers of settings, old spellings, Megatron-LM's other flags, and every problem in one message."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from megatron3d.config.check import check
from megatron3d.config.cli import parse_args
from megatron3d.config.foreign.megatron import MEGATRON
from megatron3d.config.options import BY_SPELLING, OPTIONS
from megatron3d.config.run import GivenRun
from megatron3d.errors import ConfigError, MisfitError
from tests.files.mutations import DEEP, mutated_bytes


def parse(line: str, said: list[str] | None = None) -> GivenRun:
    """The run of a command line written as in a shell, without quotes."""
    lines: list[str] = [] if said is None else said
    return parse_args(line.split(), program="pretrain_gpt.py", description="Pretrain a GPT.", log=lines.append)


def problems_of(line: str) -> list[str]:
    """The lines of the error that a command line gives."""
    with pytest.raises(ConfigError) as raised:
        parse(line)
    return str(raised.value).split("\n")


def test_every_kind_of_flag_sets_its_field() -> None:
    config = parse(
        "--num-layers 24 --lr 1.5e-4 --bf16 --disable-bias-linear --data-path 0.7 A 0.3 B --save /c --seed=5"
    )
    assert config.model.num_layers == 24
    assert config.optim.lr == 1.5e-4
    assert config.optim.bf16
    assert not config.model.add_bias_linear
    assert config.data.data_path == ("0.7", "A", "0.3", "B")
    assert config.checkpoint.save == "/c"
    assert config.data.seed == 5


def test_no_words_give_the_defaults() -> None:
    assert parse("") == GivenRun()


def test_no_spelling_belongs_to_two_options() -> None:
    spellings = [spelling for option in OPTIONS for spelling in option.flag.spellings]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--batch-size 4", "--micro-batch-size 4"),
        ("--model-parallel-size 2", "--tensor-model-parallel-size 2"),
        ("--warmup .01", "--lr-warmup-fraction 0.01"),
        ("--layernorm-epsilon 1e-6", "--norm-epsilon 1e-6"),
        ("--activations-checkpoint-method uniform", "--recompute-method uniform"),
        ("--override-opt_param-scheduler", "--override-opt-param-scheduler"),
        ("--checkpoint-activations", "--recompute-granularity full --recompute-method uniform"),
        ("--no-position-embedding --use-rotary-position-embeddings", "--position-embedding-type rope"),
        ("--loss-scale-window 1000.0", "--loss-scale-window 1000"),
        ("--normalization rmsnorm", "--normalization RMSNorm"),
        ("--cpu-optimizer --remote-device cpu", "--offload-optimizer cpu --offload-params cpu"),
        ("--enable-zbh1-pipeline", "--pipeline-schedule zb-h1"),
        (
            "--tokenizer-name-or-path D",
            "--tokenizer-type HuggingFaceTokenizer --tokenizer-model D",
        ),
    ],
)
def test_old_spellings_mean_the_new_ones(old: str, new: str) -> None:
    assert parse(old) == parse(new)


def test_a_synonym_yields_to_the_flag_itself() -> None:
    config = parse("--checkpoint-activations --recompute-method block --recompute-num-layers 2")
    assert (config.train.recompute_granularity, config.train.recompute_method) == ("full", "block")


def test_flags_override_the_file_and_the_file_overrides_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "gpt2-124m"\n[model]\nnum-layers = 6\nhidden_size = 512\n[optim]\nlr = 1e-3\n')
    config = parse(f"--config {file} --num-layers 3")
    assert config.model.num_layers == 3
    assert config.model.hidden_size == 512
    assert config.model.num_attention_heads == 12
    assert config.optim.lr == 1e-3


def test_file_keys_may_be_field_names_or_flags_in_sections_or_flat(tmp_path: Path) -> None:
    flat, sectioned = tmp_path / "a.json", tmp_path / "b.json"
    flat.write_text(
        json.dumps({"num-layers": 2, "--lr": "1e-4", "disable-bias-linear": True, "data-path": [0.5, "A", 0.5, "B"]})
    )
    sectioned.write_text(
        json.dumps(
            {
                "model": {"num_layers": 2, "add_bias_linear": False, "hidden_size": None},
                "optim": {"lr": 1e-4},
                "data": {"data_path": "0.5 A 0.5 B"},
            }
        )
    )
    by_flags = parse("--num-layers 2 --lr 1e-4 --disable-bias-linear --data-path 0.5 A 0.5 B")
    assert parse(f"--config {flat}") == parse(f"--config {sectioned}") == by_flags


def test_all_problems_of_file_and_flags_come_together(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"bf16": "yes", "moe_latent_size": 8, "num_layer": 4, "swiglu": True}))
    problems = problems_of(
        f"--config {file} --hidden-size twelve --seq-length --fp8-param-gather --num-heads 4 --lr nan"
    )
    assert len(problems) == 8
    assert sum(problem.startswith(str(file)) for problem in problems) == 3
    for word in (
        "yes",
        "--moe-latent-size 8",
        "--num-layers?",
        "twelve",
        "--seq-length has no value",
        "--fp8-param-gather",
        "nan",
    ):
        assert any(word in problem for problem in problems), word


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        (".yaml", "a: 1", "ends in '.yaml'"),
        (".json", "{", "not valid JSON"),
        (".toml", "= 3", "not valid TOML"),
        (".json", "[1]", "holds a list"),
        (".json", '{"a": ' + DEEP + "}", "nested too deep"),
        (".toml", "a = " + DEEP, "recursion"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path, suffix: str, text: str, expected: str) -> None:
    file = tmp_path / f"run{suffix}"
    file.write_text(text)
    (problem,) = problems_of(f"--config {file}")
    assert str(file) in problem
    assert expected in problem


def test_a_config_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    for content, reason in ((b'{"num_layers": "\xff"}', "it is not UTF-8"), ('{"a": 1}'.encode("utf-16"), "UTF-16")):
        (tmp_path / "run.json").write_bytes(content)
        (problem,) = problems_of(f"--config {tmp_path / 'run.json'}")
        assert "run.json is not valid JSON" in problem and reason in problem


def test_a_config_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b'\xef\xbb\xbf{"num_layers": 3}')
    assert parse_args(["--config", str(tmp_path / "run.json")], program="p", description="d").model.num_layers == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"data-path": true}', "--data-path True is not a list of words"),
        ('{"data-path": [["a"]]}', "--data-path [['a']] is not a list of words"),
        ('{"save": {"a": 1}}', "--save {'a': 1} is not a text"),
        ('{"lr": 1' + "0" * 400 + "}", "is not a number; give a finite number"),
        ('{"num_layers": 1e30}', "--num-layers 1e+30 is too large for a count"),
    ],
)
def test_a_value_of_another_type_in_a_config_file_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert any(problem in line for line in problems_of(f"--config {tmp_path / 'run.json'}"))


def test_a_number_of_hundreds_of_digits_is_refused() -> None:
    assert "is not a number" in problems_of("--lr 1" + "0" * 400)[0]
    assert "is not a number" in problems_of("--num-layers " + "9" * 5000)[0]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=mutated_bytes({"model": {"num_layers": 3, "swiglu": True}, "lr": 1e-3, "data-path": ["a", "b"], "seed": 1}))
def test_a_changed_config_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run.json").write_bytes(data)
    with contextlib.suppress(ConfigError):
        parse_args(["--config", str(tmp_path / "run.json")], program="p", description="d", log=lambda line: None)


MISWRITTEN_FILES = {
    '{"preset": null}': "preset is null; name one, or leave the key out.",
    '{"--preset": 3}': "--preset is a number; name one, or leave the key out.",
    '{"config": "other.json"}': "config names another file, and no file is read for another; give --config in the",
    '{"deepspeed-config": "ds.json"}': "deepspeed-config names another file, and no file is read for another; give",
    '{"model": 3}': "model is a number, but it names a section; put its options into an object.",
    '{"transformer": {"num_layers": 2}}': "transformer holds options and is no section; sections are model, parallel,",
    '{"model": {"model": {"num_layers": 2}}}': "model is a section within a section",
    '{"num_layers": 2, "num-layers": 3}': "num_layers and num-layers are the same option; leave one of them out.",
    '{"num_layers": 2, "model": {"num_layers": 3}}': "num_layers stands in two places of the file; leave one of them",
    '{"add_bias_linear": true, "disable-bias-linear": true}': "add_bias_linear and disable-bias-linear are the same",
    '{"moe_latent_size": 0}': "--moe-latent-size 0 is not supported",
}


@pytest.mark.parametrize("text", MISWRITTEN_FILES)
def test_what_a_config_file_must_not_hold_is_named(tmp_path: Path, text: str) -> None:
    (file := tmp_path / "run.json").write_text(text)
    (problem,) = problems_of(f"--config {file}")
    assert problem.startswith(f"{file}: {MISWRITTEN_FILES[text]}")


@pytest.mark.parametrize("text", ['{"lr": 1, "lr": 2}', '{"model": {"lr": 1, "lr": 1}}'])
def test_a_key_that_stands_twice_in_a_json_file_is_named(tmp_path: Path, text: str) -> None:
    (file := tmp_path / "run.json").write_text(text)
    for flag in ("--config", "--deepspeed_config"):
        (problem,) = problems_of(f"{flag} {file}")
        assert "is not valid JSON (it has the key 'lr' twice in one object; keep one of them)" in problem
    file.with_suffix(".toml").write_text("lr = 1\nlr = 2\n")
    assert "is not valid TOML (Cannot overwrite a value" in problems_of(f"--config {file.with_suffix('.toml')}")[0]


def test_two_config_files_are_refused_and_one_may_be_named_twice(tmp_path: Path) -> None:
    (one := tmp_path / "a.json").write_text("{}")
    (two := tmp_path / "b.json").write_text("{}")
    assert problems_of(f"--config {one} --config {two}") == [
        f"--config {one} and --config {two} are two files, of which one can be read; give one."
    ]
    assert parse(f"--config {one} --config {one}") == GivenRun()


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    (problem,) = problems_of(f"--config {tmp_path}/none.json")
    assert "none.json cannot be read" in problem


def test_unknown_flags_name_the_nearest_and_exit_with_two() -> None:
    with pytest.raises(ConfigError) as raised:
        parse("--num-layer 2 --tensor-parallel-size 4")
    assert raised.value.exit_code == 2
    assert "--num-layer 2 is unknown; did you mean --num-layers?" in str(raised.value)
    assert "--tensor-parallel-size 4 is unknown; did you mean --tensor-model-parallel-size?" in str(raised.value)


def test_flags_are_never_abbreviated() -> None:
    (problem,) = problems_of("--num-lay 2")
    assert "unknown" in problem


def test_a_flag_without_meaning_is_said_once_with_its_value() -> None:
    said: list[str] = []
    parse("--DDP-impl local --use-flash-attn --modules-to-filter a b --num-layers 2", said)
    assert [line.split(" is accepted")[0] for line in said] == [
        "--DDP-impl local",
        "--use-flash-attn",
        "--modules-to-filter a b",
    ]


@pytest.mark.parametrize(
    "line", ["--no-bias-gelu-fusion 3", "--DDP-impl local 3", "--checkpoint-activations 3", "3 --bf16"]
)
def test_a_word_that_belongs_to_no_flag_is_not_swallowed(line: str) -> None:
    (problem,) = problems_of(line)
    assert "'3' stands alone" in problem


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("--moe-latent-size 8", "leave it out"),
        ("--standalone-embedding-stage", "--pipeline-model-parallel-layout"),
        ("--fp8-hybrid", "--fp8-format"),
        ("--retro-add-retriever", "pretrain_gpt.py"),
        ("--lora-rank 4", "--finetune"),
        ("--use-mp-args-from-checkpoint-args", "--use-checkpoint-args"),
        ("--train-data wikipedia", "tools/preprocess_data.py"),
        ("--dataloader-type cyclic", "--data-path"),
    ],
)
def test_unsupported_features_are_refused_with_what_to_use_instead(line: str, instead: str) -> None:
    (problem,) = problems_of(line)
    assert problem.startswith(f"{line} is not supported: ")
    assert instead in problem


def test_a_refused_flag_is_accepted_at_the_value_that_asks_for_what_is_done_anyway() -> None:
    said: list[str] = []
    parse("--dataloader-type single", said)
    assert len(said) == 1


def test_each_foreign_flag_has_one_fate_and_is_none_of_our_options() -> None:
    listed = [flag for row in MEGATRON.accepted for flag in (*row.switches, *row.valued, *row.lists)]
    listed += [flag for row in MEGATRON.refused for flag in row.flags]
    listed += list(MEGATRON.synonyms)
    assert len(listed) == len(set(listed))
    for flag in listed:
        is_accepted, is_refused = MEGATRON.reason_and_arity(flag) is not None, MEGATRON.instead_of(flag) is not None
        assert sum([flag in BY_SPELLING, flag in MEGATRON.synonyms, is_accepted, is_refused]) == 1, flag


def test_choices_and_numbers_are_checked_with_the_value_named() -> None:
    problems = problems_of("--normalization BatchNorm --num-layers 2.5 --rotary-base big")
    assert "--normalization BatchNorm is not one of its choices; use one of: LayerNorm, RMSNorm." in problems
    assert "--num-layers 2.5 is not a whole number; use 2 or 3." in problems
    assert any(problem.startswith("--rotary-base big is not a number") for problem in problems)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--architecture t5", "use one of: gpt, bert, or path/to/file.py:NAME for one of your own."),
        ("--architecture my.py", "use one of: gpt, bert, or my.py:NAME for one of your own."),
    ],
)
def test_a_file_of_ones_own_is_named_with_what_it_holds(words: str, hint: str) -> None:
    (problem,) = problems_of(words)
    assert problem == f"{words} is not one of its choices; {hint}"
    (order,) = [one for one in check(parse("--pipeline-schedule my.py"), 1) if "schedule" in one]
    assert "or my.py:NAME for an order of your own" in order


def test_a_checkpoint_of_another_architecture_is_told_by_name_and_not_by_the_program_that_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from megatron3d.config.architectures import ModelTraits\n"
        "from megatron3d.models.gpt import build_gpt_stage\n"
        "from megatron3d.models.zoo import Architecture\n"
        "ONLY = Architecture(ModelTraits('only'), build_gpt_stage)\n"
    )
    own = f"{tmp_path}/mine.py:ONLY"
    checkpoint = Path(__file__).parents[1] / "checkpoint" / "written_before"
    for architecture, folder, end in (
        (own, "gpt", f"holds a GPT, not the model of --architecture {own}; give --architecture gpt"),
        (own, "bert", f"holds a BERT, not the model of --architecture {own}; use pretrain_bert.py"),
        ("gpt", "bert", "holds a BERT, not a GPT; use pretrain_bert.py"),
    ):
        with pytest.raises(MisfitError) as raised:
            parse(f"--use-checkpoint-args --load {checkpoint / folder} --architecture {architecture}")
        assert str(raised.value).endswith(end)


def test_negative_numbers_are_values() -> None:
    assert parse("--lr -1e-5").optim.lr == -1e-5


def test_help_shows_every_option_under_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for option in OPTIONS:
        assert f"{option.spelling} " in text or f"{option.spelling}\n" in text
    assert text.index("model: what is computed") < text.index("--num-layers") < text.index("parallel: how")


def test_an_unknown_preset_lists_the_known() -> None:
    (problem,) = problems_of("--preset gpt5")
    assert "gpt2-124m" in problem
