"""Each option that will have no effect in a run gets one line, and a run that does all it is asked to has none."""

from __future__ import annotations

import pytest

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.optim.schedule import settings_from_config
from megatron3d.train.inert_options import InertOptions
from megatron3d.train.state import Progress, last_step

SHAPE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --vocab-size 64 --micro-batch-size 2 "
    "--global-batch-size 8 --lr 1e-3 --data-path corpus --device cpu"
)

SHORT = "--seq-length-curriculum truncate --seq-length-curriculum-min-difficulty 8 --seq-length-curriculum-steps 4"


def lines(options: str, *, step: int = 0, valid: bool = True, test: bool = True, world_size: int = 1) -> list[str]:
    """What is said of a run with these options that starts after `step` steps of 8 samples."""
    words = f"{SHAPE} {options}".split()
    config = resolve(parse_args(words, program="pretrain_gpt.py", description="", log=lambda line: None), world_size)
    progress = Progress(step, step * 8, step, step * 8, step * 128, step * 128)
    schedule = settings_from_config(config.optim, config.train)
    return InertOptions(
        config,
        progress,
        last_step(config.train, config.parallel.data_parallel_size, progress, seq_length=config.model.seq_length),
        schedule,
        valid,
        test,
    ).lines()


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ("--train-tokens 4000", 35),  # 10 steps have left 3,200 tokens, which are 25 steps of 8 samples of 16
        ("--train-tokens 4000 --global-batch-size 16", 23),
        ("--train-tokens 4000 --train-samples 100", 12),
        (f"{SHORT} --train-tokens 4000", 35),
        ("--train-tokens 800", 10),
    ],
)
def test_a_run_in_tokens_ends_with_the_step_that_reaches_them_whatever_was_before(options: str, last: int) -> None:
    """A run that was resumed without its short samples, or with another batch, counts what it has consumed."""
    words = f"{SHAPE} {options}".split()
    config = resolve(parse_args(words, program="pretrain_gpt.py", description="", log=lambda line: None), 1)
    progress = Progress(10, 80, 10, 80, 800, 800)
    assert last_step(config.train, 1, progress, seq_length=16) == last


@pytest.mark.parametrize(
    "options",
    [
        "--train-iters 20",
        "--train-samples 160 --save c --save-interval 5 --eval-interval 10 --exit-interval 19",
        "--train-iters 20 --iterations-to-skip 0 19 --lr-warmup-iters 19 --profile-pipeline p",
        "--train-iters 20 --profile --profile-step-start 19 --profile-step-end 20",
        "--train-iters 20 --wandb-project p --wandb-entity e",
        "--train-iters 20 --save c --save-interval 20 --eval-interval 20",
        "--train-iters 20 --save-interval 21",  # without --save the command line says that nothing is saved
    ],
)
def test_a_run_that_does_what_it_is_asked_says_nothing(options: str) -> None:
    assert lines(options) == []


INERT_DATA_OPTIONS = [
    ("--data-temperature 3", "--data-temperature 3 has no effect on a single corpus"),
    ("--mid-level-dataset-surplus 0.1 --sample-order megatron", "0.1 has no effect on a single corpus"),
    ("--eval-iters 0 --multiple-validation-sets --data-path a b", "--multiple-validation-sets has no effect with"),
    ("--tokenizer-type ByteTokenizer --vocab-file v --vocab-size 300", "--vocab-file v has no effect with"),
    ("--tiktoken-special-tokens a b", "--tiktoken-special-tokens a b has no effect without --tokenizer-type Tik"),
    (f"{SHORT} --seq-length-curriculum-root-degree 3", "3 has no effect with --seq-length-curriculum-pacing fixed_lin"),
    (
        "--random-ltd --random-ltd-layers 1 --random-ltd-min 16 --random-ltd-steps 3",
        "3 has no effect with as many positions at first as at",
    ),
    (
        "--curriculum-metric length --curriculum-index i --curriculum-pacing fixed_discrete --curriculum-steps 5 "
        "--curriculum-difficulties 1,2 --curriculum-last-steps 4",
        "--curriculum-steps 5 has no effect with --curriculum-pacing fixed_discrete",
    ),
]


@pytest.mark.parametrize(
    ("options", "start", "line"),
    [
        ("--train-iters 20", {"step": 20}, "nothing is left to train: step 20 is made, and --train-iters is 20"),
        ("--train-samples 100", {"step": 12}, "nothing is left to train: 96 of --train-samples 100 are consumed"),
        ("--train-tokens 1600", {"step": 13}, "1664 of --train-tokens 1600 are consumed; raise it"),
        (f"{SHORT} --train-tokens 64", {"step": 1}, "128 of --train-tokens 64 are consumed; raise it"),
        (
            f"{SHORT} --train-tokens 640 --lr-warmup-tokens 700 --lr-decay-tokens 800",
            {},
            "the warm-up of 700 tokens is longer than the run of 640",
        ),
        ("--train-iters 20", {"valid": False}, "there is no validation data (--split is 969,30,1)"),
        ("--train-iters 20", {"test": False}, "there is no test data (--split is 969,30,1)"),
        ("--train-iters 20 --exit-interval 20", {}, "--exit-interval 20 stops nothing: the run ends with step 20"),
        ("--train-iters 20 --exit-interval 15", {"step": 16}, "--exit-interval 15 stops nothing"),
        ("--train-iters 20 --save c --save-interval 21", {}, "--save-interval 21 is longer than the run"),
        ("--train-iters 20 --eval-interval 21", {}, "--eval-interval 21 is longer than the run"),
        (
            "--train-iters 20 --lr-warmup-iters 30 --lr-decay-iters 40",
            {},
            "the warm-up of 30 iterations is longer than the run of 20",
        ),
        (
            "--train-samples 160 --lr-warmup-samples 200 --lr-decay-samples 400",
            {},
            "the warm-up of 200 samples is longer than the run of 160",
        ),
        (
            "--train-iters 10 --profile",
            {},
            "--profile records nothing: the last iteration is 9, counted from 0, and --profile-step-start is 10",
        ),
        (
            "--train-iters 20 --profile",
            {"step": 12},
            "--profile records nothing: the run goes on with iteration 12, counted from 0, and --profile-step-end is "
            "12; choose a later one",
        ),
        (
            "--train-iters 20 --profile-pipeline p",
            {"step": 18},
            "--profile-pipeline records nothing: its step 3 (--profile-pipeline-step) does not come, as 2 are left",
        ),
        ("--train-iters 20 --iterations-to-skip 3 20", {}, "--iterations-to-skip 20 skips nothing"),
        ("--train-iters 20 --wandb-entity e", {}, "--wandb-entity e has no effect without --wandb-project"),
        ("--train-iters 20 --mid-level-dataset-surplus 0.1", {}, "0.1 has no effect without --sample-order megatron"),
        ("--train-iters 20 --fim-rate 0.3 --fim-no-prefix x", {}, "--fim-rate 0.3, --fim-no-prefix x has no effect"),
        *((f"--train-iters 20 {options}", {}, line) for options, line in INERT_DATA_OPTIONS),
        (
            "--train-iters 20 --check-weight-hash-across-dp-replicas-interval 5",
            {},
            "compares nothing: one rank holds everything once",
        ),
        (
            "--train-iters 20 --check-weight-hash-across-dp-replicas-interval 25",
            {"world_size": 2},
            "compares nothing: it is longer than the run",
        ),
        (
            "--train-iters 20 --cp-cut zigzag",
            {},
            "--cp-cut has no effect without --context-parallel-size above 1: samples are not cut",
        ),
        (
            "--train-iters 20 --cp-comm-type allgather",
            {},
            "--cp-comm-type has no effect without --context-parallel-size above 1: samples are not cut",
        ),
        (
            "--train-iters 20 --tp-comm-overlap",
            {},
            "--tp-comm-overlap has no effect without --tensor-model-parallel-size above 1: layers communicate nothing",
        ),
        (
            "--train-iters 20 --tp-comm-overlap-chunks 8",
            {},
            "--tp-comm-overlap-chunks 8 has no effect without --tp-comm-overlap",
        ),
    ],
)
def test_an_option_without_effect_is_said_in_one_line(options: str, start: dict[str, int], line: str) -> None:
    (found,) = lines(options, **start)
    assert line in found


def test_what_is_about_corpora_has_no_effect_on_mock_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SHAPE", SHAPE.replace("--data-path corpus", "--mock-data"))
    found = lines("--train-iters 20 --data-temperature 3 --split 9,1,0", test=False)
    words = [line.split(" has no effect with --mock-data")[0] for line in found]
    assert words == ["--data-temperature 3", "--split 9,1,0"]


def test_evaluation_that_nobody_wants_is_not_missed() -> None:
    assert lines("--train-iters 20 --eval-iters 0", valid=False, test=False) == []
    assert lines("--train-iters 20 --split 99,1,0", test=False) == []


@pytest.mark.parametrize(("more", "positions"), [("", 16), ("--sequence-parallel", 8)])
def test_more_chunks_than_positions_are_said_to_be_fewer(more: str, positions: int) -> None:
    options = f"--train-iters 20 --eval-interval 10 --save c --save-interval 5 --tensor-model-parallel-size 2 {more}"
    assert lines(f"{options} --tp-comm-overlap --tp-comm-overlap-chunks {positions}", world_size=2) == []
    (line,) = lines(f"{options} --tp-comm-overlap --tp-comm-overlap-chunks 64", world_size=2)
    assert f"--tp-comm-overlap-chunks 64 is {positions} here" in line


def test_fp8_on_a_cpu_is_said_to_save_no_time() -> None:
    (line,) = lines("--train-iters 20 --eval-interval 10 --save c --save-interval 5 --bf16 --fp8-format hybrid")
    assert line.startswith("--fp8-format hybrid saves no time on a CPU") and "multiplied in bf16" in line
