"""Whole runs with a sequence-length curriculum: where they end, what they count, and that they resume exactly."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest

from megatron3d.train import state
from tests.runs.harness import MOCK, losses, records, run, run_ok, steps, words

# 4 tokens in the first step, 8 in the next two, 12 in two more, and all 16 from the sixth on.
LENGTHS = [4, 8, 8, 12, 12, 16, 16, 16]
TOKENS = [8 * sum(LENGTHS[: step + 1]) for step in range(len(LENGTHS))]
SHORT = (
    f"{MOCK.replace('--train-iters 6', '--train-tokens 700')} --seq-length-curriculum truncate "
    "--seq-length-curriculum-min-difficulty 4 --seq-length-curriculum-steps 6 --seq-length-curriculum-difficulty-step 4"
)
WITHOUT = SHORT[: SHORT.index("--seq-length-curriculum")]
RATES = "--lr-decay-style cosine --lr-decay-tokens 600 --lr-warmup-tokens 100 --min-lr 1e-3"
BY_TOKENS = f"{SHORT} {RATES}"


def megatron_deepspeed_rate(tokens: int) -> float:
    """Its `OptimizerParamScheduler.get_lr` of a warm-up and a cosine in tokens, by these numbers."""
    if tokens <= 100:
        return 3e-3 * tokens / 100
    if tokens > 600:
        return 1e-3
    return 1e-3 + 0.5 * (math.cos(math.pi * (tokens - 100) / 500) + 1) * 2e-3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metrics of a run without a stop."""
    metrics = tmp_path_factory.mktemp("whole") / "m.jsonl"
    out = run_ok(BY_TOKENS, "--metrics-file", metrics).out
    assert "4 tokens at first and 16 of 16 from step 6 on, in 4 levels" in out
    return metrics


def test_a_run_ends_with_the_step_that_reaches_its_tokens_and_its_rates_follow_them(whole: Path) -> None:
    found, last = steps(whole), next(n for n, tokens in enumerate(TOKENS) if tokens >= 700) + 1
    assert [record["sample_length"] for record in found] == LENGTHS[:last]
    assert [record["consumed_tokens"] for record in found] == TOKENS[:last]
    rates = [megatron_deepspeed_rate(tokens) for tokens in (0, *TOKENS[: last - 1])]
    assert [record["lr"] for record in found] == pytest.approx(rates, rel=1e-12)
    in_step = [record["tokens_per_second"] * record["step_time_s"] for record in found]
    assert in_step == pytest.approx([8 * length for length in LENGTHS[:last]])
    # An operation of attention for each pair of tokens, others for each token.
    flops = [record["tflops_per_device"] * record["step_time_s"] / length for record, length in zip(found, LENGTHS)]
    assert flops[1] < flops[3] < flops[5] == pytest.approx(2 * flops[3] - flops[1])


def test_a_run_stopped_among_short_steps_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    """Without the curriculum from there on, the rates still follow the tokens that were consumed, not the samples."""
    save, metrics = tmp_path / "save", tmp_path / "m.jsonl"
    flags = words(BY_TOKENS, "--metrics-file", metrics, "--save", save)
    assert run([*flags, *words("--exit-interval 3")]).code == 75
    other = tmp_path / "other"
    shutil.copytree(save, other)
    out = run_ok(WITHOUT, RATES, "--metrics-file", tmp_path / "o.jsonl", "--save", other).out
    consumed = [TOKENS[2] + 128 * step for step in range(6)]
    found = steps(tmp_path / "o.jsonl")
    assert [record["consumed_tokens"] for record in found] == consumed[1:] and "--lr-decay" not in out
    assert [record["lr"] for record in found] == pytest.approx(
        [*map(megatron_deepspeed_rate, consumed[:-1])], rel=1e-12
    )
    run_ok(*flags)
    assert losses(metrics) == losses(whole)
    assert [record["consumed_tokens"] for record in steps(metrics)] == TOKENS[: len(losses(whole))]


def test_a_checkpoint_that_did_not_count_tokens_has_those_of_whole_samples(tmp_path: Path) -> None:
    """A run of an earlier version, two steps of which had no curriculum."""
    save, metrics = tmp_path / "save", tmp_path / "m.jsonl"

    def stored_before(progress: state.Progress) -> dict[str, int]:
        return {name: count for name, count in asdict(progress).items() if "tokens" not in name}

    with mock.patch.object(state, "asdict", stored_before):
        assert run(words(WITHOUT, "--exit-interval 2 --save", save)).code == 75
    run_ok(SHORT, "--metrics-file", metrics, "--save", save)
    assert [record["sample_length"] for record in steps(metrics)] == [8, 12, 12, 16, 16]
    assert [record["consumed_tokens"] for record in steps(metrics)] == [320, 416, 512, 640, 768]


def test_evaluation_is_at_full_length(tmp_path: Path) -> None:
    """With a rate of 0 in the first step the weights stay, so that the loss must be that of a run without."""
    valid = []
    for number, flags in enumerate((SHORT, WITHOUT)):
        metrics, warmup = tmp_path / f"{number}.jsonl", "--train-iters 2 --lr-warmup-iters 1"
        run_ok(flags.replace("--train-tokens 700", warmup), "--eval-iters 1 --eval-interval 1 --metrics-file", metrics)
        valid.append(next(record["valid_loss"] for record in records(metrics) if "valid_loss" in record))
    assert valid[0] == valid[1]
