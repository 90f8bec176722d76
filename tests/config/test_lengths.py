"""Lengths of a sequence-length curriculum and tokens of a run against a loop over steps, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.config.batch_size import batch_size_at
from megatron3d.config.check import check, resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.lengths import ConsumedCounts, SampleShape, counts_at_end, sample_shape
from megatron3d.config.run import GivenRun
from megatron3d.config.sections.train import TrainConfig
from tests.config.test_batch_size import trains

BASE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2 "
    "--global-batch-size 8 --lr 1e-3 --vocab-size 64 --mock-data"
)
SHORT = "--seq-length-curriculum truncate --seq-length-curriculum-min-difficulty 8 --seq-length-curriculum-steps 20"
BY_SAMPLES = f"{BASE} {SHORT} --train-samples 800"


def parse(line: str, architecture: str = "gpt") -> GivenRun:
    return parse_args(line.split(), program="t", description="t", log=lambda text: None, architecture=architecture)


def train_of(line: str) -> TrainConfig:
    return resolve(parse(line), 1).train


def deepspeed_length(step: int, *, low: int, high: int, total: int, multiple: int, degree: int) -> int:
    """Of `step`, counted from 1, as DeepSpeed documents it, and not below the first of its multiples."""
    length = math.floor((step / total) ** (1 / degree) * (high - low) + low)
    return max(low, min(high, length - length % multiple))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_every_step_has_the_length_of_deepspeeds_formula(degree: int) -> None:
    options = f"--seq-length-curriculum-pacing fixed_root --seq-length-curriculum-root-degree {degree}"
    train = train_of(f"{BY_SAMPLES} {options}")
    wanted = {"low": 8, "high": 64, "total": 20, "multiple": 8, "degree": degree}
    found = [sample_shape(train, step, 64) for step in range(30)]
    assert found == [SampleShape(1, deepspeed_length(step + 1, **wanted)) for step in range(30)]


def test_lengths_of_discrete_levels_last_until_their_last_step() -> None:
    options = "--seq-length-curriculum-pacing fixed_discrete --seq-length-curriculum-difficulties 8,32,64"
    train = train_of(f"{BY_SAMPLES} {options} --seq-length-curriculum-last-steps 3,5")
    assert [sample_shape(train, step, 64).length for step in range(7)] == [8, 8, 8, 32, 32, 64, 64]


def test_lengths_may_come_from_a_function_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def back_and_forth(step):\n    return 16 if step % 2 else 32\n")
    train = train_of(
        f"{BASE} --train-iters 9 --seq-length-curriculum reshape --seq-length-curriculum-steps 4 "
        f"--seq-length-curriculum-pacing {file}:back_and_forth"
    )
    assert [sample_shape(train, step, 64) for step in range(5)] == [
        SampleShape(4, 16), SampleShape(2, 32), SampleShape(4, 16), SampleShape(2, 32), SampleShape(2, 32)
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    trains(),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 16)), max_size=5),
    st.booleans(),
    st.integers(0, 900),
    st.none() | st.integers(1, 9000),
    st.integers(0, 7),
)
def test_a_run_ends_where_a_loop_over_its_steps_does(
    found: tuple[TrainConfig, int],
    stretches: list[tuple[int, int]],
    splits: bool,
    samples: int,
    tokens: int | None,
    before: int,
) -> None:
    (train, dp), first, levels = found, 0, []
    for steps, length in stretches:
        levels.append((first, length))
        first += steps
    train = dataclasses.replace(train, length_levels=tuple(levels), splits_samples=splits and bool(levels))
    counts = start = ConsumedCounts(before, 3 * before, 5 * before)
    while tokens is None or counts.tokens < tokens:
        size = batch_size_at(train, counts.samples, dp)
        if counts.samples + size > samples:
            break
        length = next((length for first, length in reversed(levels) if first <= counts.step), 16)
        rows = 16 // length if splits and levels else 1
        counts = ConsumedCounts(counts.step + 1, counts.samples + size, counts.tokens + size * rows * length)
    assert counts_at_end(train, dp, 16, start=start, samples=samples, tokens=tokens) == counts


def test_a_length_in_tokens_counts_the_tokens_of_short_samples() -> None:
    """The loop of Megatron-DeepSpeed: a step more while the tokens are not reached."""
    tokens = samples = step = 0
    while tokens < 6000:
        tokens += 8 * deepspeed_length(step + 1, low=8, high=64, total=20, multiple=8, degree=1)
        step, samples = step + 1, samples + 8
    assert train_of(f"{BASE} {SHORT} --train-tokens 6000").train_samples == samples > 6000 // 64


def test_lengths_in_tokens_are_resolved_once_and_for_all() -> None:
    run = resolve(parse(f"{BY_SAMPLES} --train-samples 101 --lr-warmup-tokens 64"), 1)
    assert run.optim.lr_decay_tokens == sum(
        8 * deepspeed_length(step + 1, low=8, high=64, total=20, multiple=8, degree=1) for step in range(12)
    )
    assert (run.train.train_samples, run.optim.lr_decay_samples, run.optim.lr_warmup_samples) == (101, None, 0)
    assert resolve(run, 1) == run


REFUSED = [
    (
        "--sequence-parallel --tensor-model-parallel-size 4 --seq-length-curriculum-difficulty-step 6 "
        "--seq-length-curriculum-min-difficulty 6 --seq-length-curriculum-max-difficulty 60",
        "has the lengths 6, 18, 30, 42, 54, no multiples of 4, as --sequence-parallel with "
        "--tensor-model-parallel-size 4 ask for; use multiples of 4",
    ),
    ("--seq-length-curriculum-max-difficulty 128", "gives the length 128, which is more than --seq-length 64"),
    (
        "--seq-length-curriculum-min-difficulty 80",
        "min-difficulty 80 is above --seq-length-curriculum-max-difficulty 64",
    ),
    ("--step-batch-size-schedule 0:4,640:8", "counts tokens of full samples"),
    (
        "--lr-decay-tokens 900 --lr-warmup-samples 8",
        "--lr-warmup-samples 8 counts samples, and the learning rate follows",
    ),
    ("--lr-decay-tokens 900 --lr-warmup-tokens 900", "--lr-warmup-tokens 900 is not shorter than the decay of 900"),
    ("--lr-decay-tokens 900 --lr-warmup-tokens 9 --lr-warmup-fraction 0.1", "both set the warm-up"),
    ("--lr-decay-tokens 900 --lr-decay-style WSD --lr-wsd-decay-samples 8", "WSD has its last phase in samples"),
    (
        "--lr-decay-tokens 900 --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1",
        "given in samples; give --train-tokens",
    ),
    ("--seq-length-curriculum-difficulty-step 0", "--seq-length-curriculum-difficulty-step 0 is outside its range"),
    (
        "--seq-length-curriculum-pacing fixed_discrete --seq-length-curriculum-difficulties 8,a",
        "is no list of whole numbers",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_lengths_that_a_run_cannot_have_are_refused_at_the_start(options: str, sentence: str) -> None:
    problems = check(parse(f"{BY_SAMPLES} {options}"), 4)
    assert any(sentence in problem for problem in problems), problems


def test_a_curriculum_is_whole_and_for_running_text() -> None:
    (problem,) = check(parse(f"{BASE} --train-iters 5 --seq-length-curriculum truncate"), 1)[:1]
    assert "--seq-length-curriculum-steps is missing" in problem
    (problem,) = check(parse(f"{BASE} --train-iters 5 --seq-length-curriculum-steps 9"), 1)
    assert "--seq-length-curriculum-steps 9 means nothing without --seq-length-curriculum" in problem
    problems = check(parse(f"{BASE} {SHORT} --train-iters 5", "bert"), 1)
    assert any("are pairs of sentences" in problem for problem in problems)
