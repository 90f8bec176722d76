"""Every mistake of a command is in one answer, whatever else is wrong with it, and none of their consequences is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.config.cli import read_command, settle
from megatron3d.config.derive import derive
from megatron3d.config.origins import Origins
from megatron3d.config.run import GivenRun
from megatron3d.config.serialize import to_dict
from megatron3d.errors import ConfigError

BASE = {
    "num-layers": "4",
    "hidden-size": "64",
    "num-attention-heads": "4",
    "seq-length": "32",
    "micro-batch-size": "4",
    "global-batch-size": "32",
    "lr": "1e-3",
    "train-iters": "5",
    "vocab-size": "100",
    "mock-data": "",
    "device": "cpu",
}


def answer(words: list[str], world_size: int = 1) -> list[str]:
    """The sentences that a command is refused with; none if it is not."""
    command = read_command(words, program="pretrain_gpt.py", description="Pretrain a GPT.", log=lambda line: None)
    try:
        settle(command, world_size)
    except ConfigError as error:
        return str(error).split("\n")
    return []


def words_of(changes: Mapping[str, str | None]) -> list[str]:
    """The base command with changed, added and (None) dropped flags."""
    flags = {name: value for name, value in (BASE | changes).items() if value is not None}
    return [word for name, value in flags.items() for word in (f"--{name}", *value.split())]


def test_the_base_command_has_no_problem() -> None:
    assert answer(words_of({})) == []


def test_nine_mistakes_of_every_kind_give_nine_sentences(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"attention_dropout": 2}))
    changes = {
        "hidden-size": "65",
        "global-batch-size": "30",
        "lr": None,
        "bf16": "",
        "fp16": "",
        "train-samples": "5",
        "num-layer": "2",
        "expert-choice": "",
        "log-interval": "often",
        "config": f"{tmp_path}/run.json",
        "save": "",
    }
    sentences = answer(words_of(changes))
    expected = (
        "--hidden-size 65 is not a multiple",
        "--global-batch-size 30 is not a multiple",
        "--lr is missing",
        "--bf16 and --fp16 are both given",
        "--train-iters 5 and --train-samples 5",
        "--num-layer 2 is unknown; did you mean --num-layers?",
        "--expert-choice is unknown",
        "--log-interval often is not a number",
        f"--attention-dropout 2.0 (in {tmp_path}/run.json) is outside its range",
        "--save has no value after it",
    )
    for beginning in expected:
        assert sum(sentence.startswith(beginning) for sentence in sentences) == 1, (beginning, sentences)
    assert len(sentences) == len(expected)


@pytest.mark.parametrize("broken", ["missing.json", "broken.json", "run.yaml"])
def test_a_config_file_that_cannot_be_read_hides_no_mistake_of_the_flags(tmp_path: Path, broken: str) -> None:
    for name in ("broken.json", "run.yaml"):
        (tmp_path / name).write_text("{")
    changes = {"config": f"{tmp_path}/{broken}", "bf16": "", "fp16": "", "global-batch-size": "30", "num-layer": "2"}
    sentences = answer(words_of(changes | {"lr": None, "mock-data": None}))
    assert len(sentences) == 4, sentences  # the file may give --lr and the data
    assert sum(broken in sentence for sentence in sentences) == 1


@pytest.mark.parametrize(
    ("changes", "world"),
    [
        ({"num-layers": None, "num-layer": "2"}, 1),
        ({"num-layers": None, "n-layer": "2"}, 1),
        ({"num-layers": "two"}, 1),
        ({"num-layers": "0", "decoder-first-pipeline-num-layers": "2", "pipeline-model-parallel-size": "2"}, 2),
        ({"num-layers": None, "num_layers": "2"}, 1),
        ({"seq-length": ""}, 1),
        ({"mock-data": None, "mock-dat": ""}, 1),
        ({"vocab-size": None, "tokenizer-typ": "NullTokenizer"}, 1),
        ({"train-iters": None, "train-itrs": "5"}, 1),
        ({"train-iters": None, "max-steps": "5"}, 1),
        ({"hidden-size": "sixty"}, 1),
        ({"tensor-parallel-size": "3"}, 3),
        ({"pipeline-model-parallel-size": "0"}, 3),
        ({"offload-params": "cpu", "offload-optimizer": "cpu", "zero-stag": "3"}, 1),
        ({"kv-channels": "odd", "position-embedding-type": "rope", "hidden-size": "66"}, 1),
        ({"config": "/nowhere/run.json", "lr": None, "train-iters": None, "mock-data": None}, 1),
        ({"preset": "gpt9", "num-layers": None, "hidden-size": None}, 1),
    ],
)
def test_a_mistake_is_reported_once_and_not_by_what_follows_from_it(changes: dict[str, str], world: int) -> None:
    sentences = answer(words_of(changes), world)
    assert len(sentences) == 1, sentences


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--tensor-model-parallel-size 3 --num-attention-heads 3 --kv-channels 16",
            "--ffn-hidden-size 256 (derived from --hidden-size) is not a",
        ),
        (
            "--tensor-model-parallel-size 3 --ffn-hidden-size 256",
            "--ffn-hidden-size 256 is not a multiple of --tensor-model-parallel-size 3,",
        ),
        ("--initial-loss-scale 0.5", "--min-loss-scale 1 (the default) is above --initial-loss-scale 0.5;"),
        ("--min-loss-scale 1 --initial-loss-scale 0.5", "--min-loss-scale 1 is above --initial-loss-scale 0.5;"),
        ("--offload-params cpu --offload-optimizer cpu", "which --zero-stage 0 (the default) does not;"),
        ("--erf-gelu --swiglu", "--swiglu and --activation gelu (which --erf-gelu means) ask for different"),
        (
            "--checkpoint-activations --recompute-activations",
            "--recompute-granularity is full (which --checkpoint-activations means);",
        ),
        (
            "--preset gpt2-124m --max-position-embeddings 16",
            "--seq-length 32 is longer than --max-position-embeddings 16;",
        ),
        (
            "--preset gpt2-124m --seq-length 2048",
            "--seq-length 2048 is longer than --max-position-embeddings 1024 (of --preset gpt2-124m);",
        ),
        ("--offload-optimizer cpu --optimizer-implementation apex --optimizer muon", "--optimizer is muon; use"),
        ("--config {file}", "--bf16 (in {file}) and --fp16 (in {file}) are both given,"),
        ("--config {file} --bf16 --fp16", "--bf16 and --fp16 are both given,"),
        (
            "--config {file} --bf16 --lr-warmup-iters 9",
            "--lr-warmup-iters 9 is not shorter than the decay of 7 iters (--lr-decay-iters",
        ),
        ("--config {file} --bf16 --min-lr 1", "--min-lr 1 is above --lr 0.001 (in {file}), from which"),
        ("--num-experts 8 many --moe-layer-freq 2", "--num-experts 8 many has many, and each layer"),
        (
            "--num-experts 8 4 --moe-layer-freq 2 --expert-model-parallel-size 3",
            "does not divide --num-experts 8; use a divisor",
        ),
    ],
)
def test_a_value_that_no_flag_gave_is_told_with_its_origin(tmp_path: Path, flags: str, said: str) -> None:
    (file := tmp_path / "run.json").write_text(json.dumps({"bf16": True, "fp16": True, "lr": 1e-3, "train_iters": 7}))
    dropped = {"lr": None, "train-iters": None} if "{file}" in flags else {}
    if "--preset gpt2-124m --seq" in flags:
        dropped = {"seq-length": None}
    found = answer([*words_of({"global-batch-size": "12"} | dropped), *flags.format(file=file).split()], 3)
    assert any(said.format(file=file) in sentence for sentence in found), found


def test_a_remedy_has_no_origins() -> None:
    origins = Origins({}, GivenRun(), derive(GivenRun(), 1))
    assert origins.put_into("--split 969,30,1, or --seed 12345: a; use --split 969,30,1.") == (
        "--split 969,30,1 (the default), or --seed 12345: a; use --split 969,30,1."
    )


def test_a_stored_run_is_not_blamed_for_what_was_derived(tmp_path: Path) -> None:
    command = read_command(words_of({}), program="pretrain_gpt.py", description="", log=lambda line: None)
    (file := tmp_path / "run.json").write_text(json.dumps(to_dict(settle(command, 1))))
    (sentence,) = answer(["--config", str(file), "--num-attention-heads", "5"])
    assert sentence.startswith(f"--hidden-size 64 (in {file}) is not a multiple of --num-attention-heads 5,")
    wide = answer(["--config", str(file), *["--tensor-model-parallel-size", "3", "--num-attention-heads", "3"]], 3)
    assert any("--ffn-hidden-size 256 (derived from --hidden-size)" in sentence for sentence in wide), wide


def test_a_world_that_does_not_factor_is_not_taken_for_a_data_parallel_size() -> None:
    """5 ranks over TP 2 leave 2 and a half replicas; of the batch only the micro-batch can be judged."""
    flags = {"tensor-model-parallel-size": "2", "global-batch-size": "36"}
    (sentence,) = answer(words_of(flags), 5)
    assert sentence.startswith("A world of 5 ranks")
    both = answer(words_of(flags | {"global-batch-size": "30"}), 5)
    assert len(both) == 2 and both[1].startswith("--global-batch-size 30 is not a multiple of micro-batch 4; use")


# (changes, the beginning of the sentence they must give). Each concerns options of its own.
MISTAKES: tuple[tuple[dict[str, str | None], str], ...] = (
    ({"hidden-size": "65"}, "--hidden-size 65 is not a multiple"),
    ({"global-batch-size": "30"}, "--global-batch-size 30 is not a multiple"),
    ({"lr": None}, "--lr is missing"),
    ({"lr": "fast"}, "--lr fast is not a number"),
    ({"lr": "-1"}, "--lr -1.0 is outside its range"),
    ({"train-samples": "5"}, "--train-iters 5 and --train-samples 5"),
    ({"num-layer": "2"}, "--num-layer 2 is unknown"),
    ({"expert-choice": ""}, "--expert-choice is unknown"),
    ({"bf16": "", "fp16": ""}, "--bf16 and --fp16 are both given"),
    ({"swiglu": "", "squared-relu": ""}, "--swiglu and --squared-relu"),
    ({"moe-router-pre-softmax": ""}, "--moe-router-pre-softmax is about experts"),
    ({"fp8-param-gather": ""}, "--fp8-param-gather is not supported"),
    ({"split": "0,1"}, "--split 0,1 leaves nothing"),
    ({"log-interval": "often"}, "--log-interval often is not a number"),
    ({"eval-interval": ""}, "--eval-interval has no value"),
    ({"keep-last": "2"}, "--keep-last 2 needs --save"),
    ({"finetune": ""}, "--finetune takes the weights"),
    ({"offload-dir": "d"}, "--offload-dir d is not used"),
    ({"zero-shard-size": "1"}, "--zero-shard-size 1 shards nothing"),
    ({"optimizer": "adamm"}, "--optimizer adamm is not one of its choices"),
    ({"rotary-percent": "1.5"}, "--rotary-percent 1.5 is outside its range"),
    ({"weight-decay-incr-style": "linear"}, "--weight-decay-incr-style linear needs"),
    ({"preset": "gpt9"}, "--preset gpt9 is not known"),
    ({"gradient-accumulation-steps": "3", "global-batch-size": "32"}, "--global-batch-size 32 is not micro-batch"),
    ({"seed=": ""}, "--seed  is not a number"),
    ({"cp-comm-type": "rings"}, "--cp-comm-type rings is none of allgather, p2p"),
    ({"no-pipeline-parallel": "stray"}, "'stray' stands alone"),
)


@given(st.lists(st.sampled_from(MISTAKES), max_size=9), st.integers(1, 3))
@settings(deadline=None, max_examples=300)
def test_any_combination_of_mistakes_gives_a_sentence_for_each(
    mistakes: list[tuple[dict[str, str | None], str]], world: int
) -> None:
    changes: dict[str, str | None] = {}
    expected = []
    for change, beginning in mistakes:
        if not changes.keys() & change.keys():
            changes |= change
            expected.append(beginning)
    sentences = answer(words_of(changes), world)
    for beginning in expected:
        assert any(sentence.startswith(beginning) for sentence in sentences), (beginning, changes, sentences)
    assert len(sentences) >= len(expected)


_WORD = st.one_of(
    st.sampled_from([f"--{name}" for name in (*BASE, "config", "preset", "data-path", "rampup-batch-size")]),
    st.sampled_from(["0", "-1", "1e400", "nan", "x", "--", "-", "", "=", "--=1", "-x", "--bf16=1", "3 3 3"]),
    st.text(max_size=5),
)


@given(st.lists(_WORD, max_size=12))
@settings(deadline=None, max_examples=300)
def test_no_words_at_all_end_in_a_traceback(words: list[str]) -> None:
    answer([word for word in words if word not in ("-h", "--help")])
