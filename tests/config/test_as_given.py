"""`--config run.json` with flags after it gives the run that its options and these flags would give alone."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from megatron3d.config.as_given import DERIVED
from megatron3d.config.check import checked, with_vocab_size
from megatron3d.config.cli import parse_args, read_command, settle
from megatron3d.config.derive import complete
from megatron3d.config.options import BY_KEY
from megatron3d.config.origins import DERIVED_FROM
from megatron3d.config.run import GivenRun, RunConfig
from megatron3d.config.serialize import AS_GIVEN, from_dict, to_dict, to_json
from megatron3d.errors import ConfigError
from tests.files.mutations import mutated_values

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --lr 1e-3 "
    "--train-iters 5 --vocab-size 100 --mock-data"
)
BY_SAMPLES = BASE.replace("--train-iters 5", "--train-samples 900")
WRITTEN_BEFORE = Path(__file__).parents[1] / "checkpoint" / "written_before"


def parse(line: str, architecture: str = "gpt") -> GivenRun:
    lines: list[str] = []
    return parse_args(line.split(), program="t", description="t", log=lines.append, architecture=architecture)


def resolved(line: str, world_size: int, vocab_size: int = 100, architecture: str = "gpt") -> RunConfig:
    return with_vocab_size(checked(parse(line, architecture), world_size), vocab_size)


def written(tmp_path: Path, run: RunConfig, *, with_record: bool = True) -> Path:
    """A `run.json` of this version, or of one that kept no record of what was given."""
    stored = to_dict(run)
    if not with_record:
        del stored[AS_GIVEN]
    (tmp_path / "run.json").write_text(json.dumps(stored))
    return tmp_path / "run.json"


ROPE, YARN = "--position-embedding-type rope", "--position-embedding-type yarn"
YARN_OF_8 = f"{YARN} --rotary-original-max-position-embeddings 8"
# (options of the stored run, ranks it had, flags after --config, ranks now, options that give the same run)
CHANGES = [
    ("", 1, "--hidden-size 128", 1, "--hidden-size 128"),
    ("", 1, "--swiglu", 1, "--swiglu"),
    ("--squared-relu", 1, "--swiglu", 1, "--swiglu"),
    ("--activation relu", 1, "--swiglu", 1, "--swiglu"),
    ("", 1, "--train-iters 20", 1, "--train-iters 20"),
    ("", 1, "--seq-length 64", 1, "--seq-length 64"),
    ("", 1, "--num-attention-heads 8", 1, "--num-attention-heads 8"),
    ("--group-query-attention", 1, "--num-query-groups 2", 1, "--group-query-attention --num-query-groups 2"),
    ("", 1, "--micro-batch-size 4", 1, "--micro-batch-size 4"),
    ("--gradient-accumulation-steps 3", 4, "", 2, "--gradient-accumulation-steps 3"),
    ("", 2, "--gradient-accumulation-steps 3", 2, "--gradient-accumulation-steps 3"),
    ("--global-batch-size 8", 2, "--gradient-accumulation-steps 3", 2, "--gradient-accumulation-steps 3"),
    ("--gradient-accumulation-steps 3", 2, "--global-batch-size 8", 2, "--global-batch-size 8"),
    ("--ffn-hidden-size 200", 1, "--hidden-size 128", 1, "--ffn-hidden-size 200 --hidden-size 128"),
    ("--recompute-activations", 1, "--recompute-granularity full", 1, "--recompute-granularity full"),
    ("--recompute-method uniform", 1, "--recompute-activations", 1, "--recompute-activations"),
    ("--use-distributed-optimizer", 2, "--zero-stage 0", 2, ""),
    ("--bf16", 1, "--fp16", 1, "--fp16"),
    (f"{YARN} --yarn-original-max-position-embeddings 8", 1, "--seq-length 64", 1, f"{YARN_OF_8} --seq-length 64"),
    ("--use-rotary-position-embeddings --use-rope-scaling", 1, "", 1, f"{ROPE} --rotary-scaling llama3"),
    (f"{ROPE} --rotary-seq-len-interpolation-factor 4", 1, "", 1, f"{ROPE} --rotary-seq-len-interpolation-factor 4"),
    ("--lr-warmup-iters 2", 1, "--lr-warmup-fraction 0.1", 1, "--lr-warmup-fraction 0.1"),
    ("--pipeline-model-parallel-size 2", 2, "--num-virtual-stages-per-pipeline-rank 2", 2, "2 stages"),
]
LENGTHS_IN_TOKENS = "--train-tokens 3200 --lr-decay-tokens 1600 --lr-warmup-tokens 320"
SHORT_AT_FIRST = (
    "--seq-length-curriculum truncate --seq-length-curriculum-min-difficulty 8 --seq-length-curriculum-steps 20"
)
STAGES = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize(("stored", "ranks", "flags", "now", "same"), CHANGES)
def test_flags_after_a_stored_run_derive_what_depends_on_them(
    tmp_path: Path, stored: str, ranks: int, flags: str, now: int, same: str, with_record: bool
) -> None:
    file = written(tmp_path, resolved(f"{BASE} {stored}", ranks), with_record=with_record)
    assert resolved(f"--config {file} {flags}", now) == resolved(
        f"{BASE} {STAGES if same == '2 stages' else same}", now
    )


@pytest.mark.parametrize("with_record", [True, False])
def test_lengths_in_samples_and_tokens_are_derived_again(tmp_path: Path, with_record: bool) -> None:
    tokens = BASE.replace("--train-iters 5", LENGTHS_IN_TOKENS)
    short = f"{tokens} {SHORT_AT_FIRST}"
    for stored, flags in (
        (BY_SAMPLES, "--train-samples 500"),
        (tokens, "--train-tokens 6400 --seq-length 16"),
        (short, "--train-tokens 6400"),
        (f"{BY_SAMPLES} --lr-warmup-tokens 64 {SHORT_AT_FIRST}", "--train-samples 500"),
    ):
        file = written(tmp_path, resolved(stored, 1), with_record=with_record)
        assert resolved(f"--config {file} {flags}", 1) == resolved(f"{stored} {flags}", 1)


def test_the_tables_of_derived_options_name_all_that_are_derived() -> None:
    in_tokens = f"{BASE.replace('--train-iters 5', LENGTHS_IN_TOKENS)} --vocab-file v --recompute-granularity full"
    short = f"{BY_SAMPLES} --lr-warmup-tokens 64 {SHORT_AT_FIRST}"
    runs = [resolved(f"{BASE} {stored}", ranks) for stored, ranks, *_ in CHANGES]
    runs += [resolved(in_tokens, 1), resolved(short, 1)]
    found = {key for run in runs for key, value in run.as_given.items() if value == BY_KEY[key].default}
    assert found == set(DERIVED)
    assert {name for _, name in DERIVED} == set(DERIVED_FROM)


def test_what_was_given_is_kept_although_it_equals_what_would_be_derived(tmp_path: Path) -> None:
    """A record has the difference; without one the width of the MLP counts as derived."""
    run = resolved(f"{BASE} --ffn-hidden-size 256 --global-batch-size 4", 2)
    file = written(tmp_path, run)
    assert resolved(f"--config {file} --hidden-size 128", 1).model.ffn_hidden_size == 256
    assert resolved(f"--config {file}", 1).train.global_batch_size == 4
    file = written(tmp_path, run, with_record=False)
    assert resolved(f"--config {file} --hidden-size 128", 1).model.ffn_hidden_size == 512
    assert resolved(f"--config {file}", 1).train.global_batch_size == 4


def test_what_had_no_effect_in_the_stored_run_has_one_where_it_can(tmp_path: Path) -> None:
    file = written(tmp_path, resolved(f"{BASE} --sequence-parallel", 1))
    flags = "--tensor-model-parallel-size 2"
    assert resolved(f"--config {file} {flags}", 2) == resolved(f"{BASE} --sequence-parallel {flags}", 2)


def test_the_vocabulary_and_the_end_of_a_document_are_those_of_the_tokenizer_that_is_used_now(tmp_path: Path) -> None:
    words = f"{BASE.replace('--vocab-size 100', '')} --tokenizer-type NullTokenizer --vocab-size"
    file = written(tmp_path, resolved(f"{words} 100", 1, vocab_size=101))
    assert json.loads(file.read_text())[AS_GIVEN]["data"] == {"eod_token": None}
    open_vocabulary = BASE.replace("--vocab-size 100", "--vocab-file v --merge-file m")
    other = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model d"
    for with_record in (True, False):
        file = written(tmp_path, resolved(f"{words} 100", 1, vocab_size=101), with_record=with_record)
        assert resolved(f"--config {file} --vocab-size 200", 1, vocab_size=201) == resolved(f"{words} 200", 1, 201)
        file = written(tmp_path, resolved(open_vocabulary, 1, vocab_size=300), with_record=with_record)
        assert resolved(f"--config {file} {other}", 1, vocab_size=90).model.vocab_size == 90


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_a_run_of_an_earlier_version_is_repeated_as_it_is_stored(name: str) -> None:
    file = WRITTEN_BEFORE / name / "iter_0000003" / "run.json"
    stored = from_dict(json.loads(file.read_text()))
    assert resolved(f"--config {file}", 1, stored.model.vocab_size, name) == stored
    assert resolved(f"--config {file}", 2, stored.model.vocab_size, name).train.global_batch_size == 4


def test_a_stored_run_is_whole_so_that_a_preset_beside_it_gives_nothing(tmp_path: Path) -> None:
    run = resolved(BASE, 1)
    file, said = written(tmp_path, run), []
    words = f"--preset llama2-7b --config {file}".split()
    assert complete(settle(read_command(words, program="t", description="t", log=said.append), 1)) == run
    assert said == [f"--preset llama2-7b gives nothing: --config {file} is a run.json, which has the whole model."]


def test_a_stored_run_without_its_model_takes_that_of_a_preset(tmp_path: Path) -> None:
    stored = to_dict(resolved(BASE, 1))
    del stored["model"], stored[AS_GIVEN]["model"]
    (file := tmp_path / "run.json").write_text(json.dumps(stored))
    assert resolved(f"--preset gpt2-124m --config {file}", 1, 50257).model.hidden_size == 768


def test_a_record_without_the_number_of_ranks_is_refused_with_what_to_take_out(tmp_path: Path) -> None:
    stored = to_dict(resolved(BASE, 1))
    del stored["parallel"]["world_size"]
    (file := tmp_path / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"but not its world_size in parallel, .* take as_given out too"):
        parse(f"--config {file}")
    del stored[AS_GIVEN]
    file.write_text(json.dumps(stored))
    assert resolved(f"--config {file} --hidden-size 128", 1).model.ffn_hidden_size == 256


def test_the_record_is_stored_and_read_with_the_run() -> None:
    run = resolved(f"{BASE} --swiglu", 2)
    again = from_dict(json.loads(to_json(run)))
    assert (again, again.as_given) == (run, run.as_given)
    assert run.as_given["model", "ffn_hidden_size"] is None and ("model", "hidden_size") not in run.as_given
    assert checked(run, 2).as_given == run.as_given


def test_a_derived_value_that_was_changed_by_hand_is_not_passed_over(tmp_path: Path) -> None:
    stored = to_dict(resolved(BASE, 1))
    stored["model"]["ffn_hidden_size"] = 512
    (file := tmp_path / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"ffn_hidden_size is 512 in model, but it was derived, .* give 256; take it"):
        parse(f"--config {file}")
    del stored[AS_GIVEN]["model"]["ffn_hidden_size"]
    file.write_text(json.dumps(stored))
    assert resolved(f"--config {file}", 1).model.ffn_hidden_size == 512


@pytest.mark.parametrize("record", [None, 3, [1], {"model": 3}, {"modl": {}}, {"model": {"ffn_hidden_size": "wide"}}])
def test_a_damaged_record_is_named(tmp_path: Path, record: Any) -> None:
    (file := tmp_path / "run.json").write_text(json.dumps(to_dict(resolved(BASE, 1)) | {AS_GIVEN: record}))
    with pytest.raises(ConfigError, match=r"run\.json.*(as_given|--ffn-hidden-size wide)"):
        parse(f"--config {file}")


@pytest.mark.parametrize("with_record", [True, False])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed=mutated_values(to_dict(resolved(BASE, 2))))
def test_a_changed_run_json_as_a_config_file_is_read_or_refused(
    tmp_path: Path, with_record: bool, changed: Any
) -> None:
    if not with_record and isinstance(changed, dict):
        changed.pop(AS_GIVEN, None)
    with contextlib.suppress(ValueError, TypeError):  # what no JSON file holds
        (tmp_path / "run.json").write_text(json.dumps(changed, allow_nan=False))
    with contextlib.suppress(ConfigError):
        words = ["--config", str(tmp_path / "run.json")]
        settle(read_command(words, program="t", description="t", log=lambda line: None), 2)
