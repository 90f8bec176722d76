"""Pacing: DeepSpeed's documented formulas, steps that never lead down, and words that describe none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron3d.config.check import check
from megatron3d.config.cli import parse_args
from megatron3d.config.pacing import Pacing, PacingOptions, build_pacing, pacing_problems, plateaus
from megatron3d.errors import ConfigError
from tests.runs.harness import MOCK


def documented(step: int, low: int, high: int, total: int, multiple: int, degree: int) -> int:
    """The difficulty as DeepSpeed's documentation and comments describe it, in whole numbers where it has them."""
    level = math.floor((step / total) ** (1.0 / degree) * (high - low) + low)
    level -= level % multiple
    first = low if low % multiple == 0 else low + multiple - low % multiple
    return min(max(level, first), high)


@pytest.mark.parametrize(
    ("low", "high", "total", "multiple", "degree"),
    [(80, 2048, 300, 8, 1), (64, 1024, 137, 8, 2), (1, 100, 500, 1, 2), (60, 1000, 90, 16, 3), (5, 5, 10, 1, 1)],
)
def test_linear_and_root_follow_the_documented_formula(
    low: int, high: int, total: int, multiple: int, degree: int
) -> None:
    kind = "fixed_linear" if degree == 1 else "fixed_root"
    pacing = build_pacing(PacingOptions(kind, low, high, total, multiple, degree))
    bounds = [pacing.bound(step) for step in range(1, 2 * total)]
    assert bounds == [documented(step, low, high, total, multiple, degree) for step in range(1, 2 * total)]
    assert bounds == sorted(bounds) and bounds[-1] == high
    assert pacing.num_steps == total or bounds[total - 1] < high


def test_a_fractional_difficulty_step_keeps_multiples_that_floats_miss() -> None:
    pacing = build_pacing(PacingOptions("fixed_linear", 0.3, 0.9, 6, 0.1))
    assert [round(pacing.bound(step), 9) for step in range(1, 8)] == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    assert pacing.bound(6) == 0.9


def test_each_discrete_difficulty_holds_up_to_its_last_step() -> None:
    pacing = build_pacing(PacingOptions("fixed_discrete", difficulties=(1, 2, 3), last_steps=(5, 10)))
    assert [pacing.bound(step) for step in (1, 5, 6, 10, 11, 1000)] == [1, 1, 2, 2, 3, 3]
    assert plateaus(pacing) == ((1, 1), (6, 2), (11, 3))


@pytest.mark.parametrize("high", [100, 2047])
def test_plateaus_are_the_bounds_of_all_steps_in_short(high: int) -> None:
    """Where the maximum is no multiple of the step, the formula reaches it only after T."""
    pacing: Pacing = build_pacing(PacingOptions("fixed_root", 8, high, 60, 8))
    found = plateaus(pacing)
    for step in range(1, 200):
        assert pacing.bound(step) == [bound for first, bound in found if first <= step][-1]
    assert found[-1][1] == high


def test_a_function_of_the_users_own_is_asked_for_the_steps_it_has(tmp_path: Path) -> None:
    (file := tmp_path / "mine.py").write_text(
        "def falling(step: int) -> float:\n    return 10.0 - step\ndef lost(step: int) -> float:\n    return 1 / 0\n"
    )
    pacing = build_pacing(PacingOptions(f"{file}:falling", total_steps=3))
    assert [pacing.bound(step) for step in (1, 2, 3, 50)] == [9.0, 8.0, 7.0, 7.0]
    with pytest.raises(ConfigError, match=r"lost failed at step 1: division by zero"):
        build_pacing(PacingOptions(f"{file}:lost", total_steps=3)).bound(1)
    with pytest.raises(ConfigError, match=r"--curriculum-pacing .*has no function 'other'; it has falling, lost"):
        build_pacing(PacingOptions(f"{file}:other", total_steps=3))


BAD: dict[str, PacingOptions] = {
    "--x-pacing cubic is not known; use one of fixed_linear": PacingOptions("cubic"),
    "--x-steps is missing": PacingOptions("fixed_linear", 1, 2),
    "--x-steps 0 is outside its range; it must be from 1 to 100000000": PacingOptions("fixed_root", 1, 2, 0),
    "--x-min-difficulty is missing": PacingOptions("fixed_linear", None, 2, 5),
    "--x-max-difficulty inf is not finite": PacingOptions("fixed_linear", 1, math.inf, 5),
    "--x-min-difficulty 9 is above --x-max-difficulty 2": PacingOptions("fixed_linear", 9, 2, 5),
    "--x-difficulty-step 0 is outside its range": PacingOptions("fixed_linear", 1, 2, 5, 0),
    "--x-difficulty-step 8 is larger than the whole range from 1 to 2": PacingOptions("fixed_linear", 1, 2, 5, 8),
    "--x-root-degree 0 is outside its range": PacingOptions("fixed_root", 1, 2, 5, 1, 0),
    "one step fewer in --x-last-steps (given: none) than difficulties in --x-difficulties (given: 1)": PacingOptions(
        "fixed_discrete", difficulties=(1,)
    ),
    "--x-last-steps 5,5 must rise": PacingOptions("fixed_discrete", difficulties=(1, 2, 3), last_steps=(5, 5)),
    "--x-difficulties 1,nan has a number that is not finite": PacingOptions(
        "fixed_discrete", difficulties=(1, math.nan), last_steps=(5,)
    ),
}


@pytest.mark.parametrize("sentence", BAD)
def test_options_that_describe_no_pacing_are_named(sentence: str) -> None:
    assert any(sentence in problem for problem in pacing_problems(BAD[sentence], "--x"))


FILES = MOCK.replace("--mock-data", "--data-path somewhere")
INDEX = "--curriculum-metric a b --curriculum-index there --curriculum-steps 10"
BAD_OPTIONS: dict[str, str] = {
    "--curriculum-index, --curriculum-steps bound nothing": "--curriculum-index d --curriculum-steps 3",
    "--curriculum-deepspeed-index are both missing": "--curriculum-metric a --curriculum-steps 1",
    "has 3 words for 2 metrics; give one for each metric": f"{INDEX} --curriculum-min-difficulty 1 2 3",
    "has many, which cannot be read": f"{INDEX} --curriculum-root-degree many",
    "rank is none of value, percentile": f"{INDEX} --curriculum-difficulty-type rank",
    "--curriculum-min-difficulty is missing": f"{INDEX} --curriculum-difficulty-type value",
    "give 101 for a, which is no percentile": f"{INDEX} --curriculum-max-difficulty 101",
    "--curriculum-warmup-fraction 2.0 is outside its range": f"{INDEX} --curriculum-warmup-fraction 2",
    "has 3 words for 2 metrics; give two for each": (
        "--curriculum-metric a b --curriculum-steps 9 --curriculum-deepspeed-index 1 2 3"
    ),
    "-fraction 0.1 and --curriculum-warmup-steps 9 both set the end of the warm-up": (
        "--curriculum-metric a --curriculum-index d --curriculum-warmup-fraction 0.1 --curriculum-warmup-steps 9"
    ),
    "names a metric twice": "--curriculum-metric a a --curriculum-steps 9 --curriculum-index d",
    "--curriculum-steps is missing": "--curriculum-metric a --curriculum-index d",
}


@pytest.mark.parametrize("sentence", BAD_OPTIONS)
def test_bad_options_of_the_curriculum_are_named_at_the_start(sentence: str) -> None:
    problems = problems_of(BAD_OPTIONS[sentence])
    assert any(sentence in problem for problem in problems), problems


def test_mock_data_has_no_curriculum() -> None:
    assert any("mock data has no index" in problem for problem in problems_of(INDEX, base=MOCK))


def test_good_options_of_the_curriculum_are_no_problem() -> None:
    assert problems_of(f"{INDEX} --curriculum-difficulty-type percentile value --curriculum-max-difficulty 100") != []
    good = "--curriculum-difficulty-type percentile value --curriculum-min-difficulty 5 --curriculum-max-difficulty 100"
    assert problems_of(f"{INDEX} {good}") == []
    assert problems_of("--curriculum-metric a --curriculum-index d --curriculum-warmup-fraction 0.5") == []


def problems_of(options: str, *, base: str = FILES) -> list[str]:
    argv = f"{base} {options}".split()
    run = parse_args(argv, program="p", description="d", log=lambda line: None)
    return check(run, 1)
