"""The words of the curriculum's options, read: for each metric what bounds it and how the bound rises.

A word stands for one metric, in the order of `--curriculum-metric`; a single word stands for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from megatron3d.config.batch_size import iterations_for_samples
from megatron3d.config.pacing import PacingOptions
from megatron3d.config.sections.data_efficiency import CurriculumConfig
from megatron3d.config.sections.train import DraftTrain

DifficultyType = Literal["value", "percentile"]
DIFFICULTY_TYPES: tuple[DifficultyType, ...] = ("value", "percentile")
DEFAULT_PACING = "fixed_root"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class MetricBound:
    """What bounds one metric: its name, what the bound is compared with, and the options of its pacing."""

    metric: str
    difficulty_type: DifficultyType
    pacing: PacingOptions


@dataclass(frozen=True)
class CurriculumPlan:
    """All bounds of a curriculum.

    Attributes:
        bounds: one for each metric.
        warmup_steps: steps after which samples come as without a curriculum; None where it lasts.
        problems: sentences about words that cannot be read, whose defaults stand in the bounds.
    """

    bounds: tuple[MetricBound, ...]
    warmup_steps: int | None
    problems: tuple[str, ...]


def plan_of(curriculum: CurriculumConfig) -> CurriculumPlan:
    """The words as bounds; by default they rise until a warm-up ends."""
    warmup_steps = curriculum.curriculum_warmup_steps
    words = _Words(len(curriculum.curriculum_metric))
    types = words.read("--curriculum-difficulty-type", curriculum.curriculum_difficulty_type, _difficulty_type)
    kinds = words.read("--curriculum-pacing", curriculum.curriculum_pacing, str)
    lows = words.read("--curriculum-min-difficulty", curriculum.curriculum_min_difficulty, float)
    highs = words.read("--curriculum-max-difficulty", curriculum.curriculum_max_difficulty, float)
    steps = words.read("--curriculum-steps", curriculum.curriculum_steps, int)
    sizes = words.read("--curriculum-difficulty-step", curriculum.curriculum_difficulty_step, float)
    degrees = words.read("--curriculum-root-degree", curriculum.curriculum_root_degree, int)
    listed = words.read("--curriculum-difficulties", curriculum.curriculum_difficulties, _numbers(float))
    last_steps = words.read("--curriculum-last-steps", curriculum.curriculum_last_steps, _numbers(int))
    bounds = []
    for place, metric in enumerate(curriculum.curriculum_metric):
        kind = types[place] or "percentile"
        low, high, number = lows[place], highs[place], steps[place]
        if kind == "percentile":
            low, high = 1 if low is None else low, 100 if high is None else high
        pacing = PacingOptions(
            kinds[place] or DEFAULT_PACING,
            low,
            high,
            warmup_steps if number is None else number,
            _or(sizes[place], 1),
            _or(degrees[place], 2),
            listed[place] or (),
            last_steps[place] or (),
        )
        bounds.append(MetricBound(metric, kind, pacing))
    return CurriculumPlan(tuple(bounds), warmup_steps, tuple(words.problems))


def total_steps(train: DraftTrain, data_parallel_size: int) -> int | None:
    """The optimizer steps of the whole run, None where the options do not say."""
    if train.train_iters is not None:
        return train.train_iters
    if train.train_samples is None or not train.global_batch_size:
        return None
    return iterations_for_samples(train, train.train_samples, data_parallel_size)


def warmup_steps_of(curriculum: CurriculumConfig, train: DraftTrain, data_parallel_size: int) -> int | None:
    """The steps of the share of the run that --curriculum-warmup-fraction is, None without one."""
    share = curriculum.curriculum_warmup_fraction
    if share is None:
        return None
    steps = total_steps(train, data_parallel_size)
    return None if steps is None else max(1, round(share * steps))


class _Words:
    """Reads options of several words and keeps the problems."""

    def __init__(self, num_metrics: int) -> None:
        self._num_metrics = num_metrics
        self.problems: list[str] = []

    def read(self, flag: str, words: Sequence[str], convert: Callable[[str], _Value]) -> list[_Value | None]:
        """The value for each metric, None where none was given or it cannot be read."""
        nothing: list[_Value | None] = [None] * self._num_metrics
        if not words:
            return nothing
        if len(words) not in (1, self._num_metrics):
            self.problems.append(
                f"{flag} {' '.join(words)} has {len(words)} words for {self._num_metrics} metrics; give one for each "
                "metric, or one for all."
            )
            return nothing
        found: list[_Value | None] = []
        for word in words:
            try:
                found.append(convert(word))
            except ValueError as error:
                self.problems.append(
                    f"{flag} {' '.join(words)} has {word}, which cannot be read ({error}); correct it."
                )
                found.append(None)
        return found * self._num_metrics if len(found) == 1 else found


def _difficulty_type(word: str) -> DifficultyType:
    if word not in DIFFICULTY_TYPES:
        raise ValueError(f"{word} is none of {', '.join(DIFFICULTY_TYPES)}")
    return cast(DifficultyType, word)


def _numbers(convert: Callable[[str], _Value]) -> Callable[[str], tuple[_Value, ...]]:
    return lambda word: tuple(convert(one) for one in word.split(","))


def _or(value: _Value | None, default: _Value) -> _Value:
    return default if value is None else value
