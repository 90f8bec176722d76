"""The batch-size ramp and the arithmetic of iterations and samples, against a simulation step by step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.config.batch_size import (
    batch_size_at,
    batch_size_levels,
    iterations_for_samples,
    num_microbatches,
    parse_step_schedule,
    samples_for_iterations,
)
from megatron3d.config.derive import derive
from megatron3d.config.run import GivenRun
from megatron3d.config.sections.train import GivenTrain, TrainConfig
from megatron3d.errors import ConfigError


@st.composite
def trains(draw: st.DrawFn) -> tuple[TrainConfig, int]:
    """A run with a constant batch, a ramp, or a list of steps, and its data-parallel size."""
    dp, micro = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    unit = dp * micro
    start, increment, increments = (draw(st.integers(1, 4)) for _ in range(3))
    full = unit * (start + increment * increments)
    kind = draw(st.sampled_from(["constant", "ramp", "steps"]))
    if kind == "constant":
        return TrainConfig(micro_batch_size=micro, global_batch_size=full), dp
    if kind == "ramp":
        ramp = (str(unit * start), str(unit * increment), str(draw(st.integers(0, 300))))
        return TrainConfig(micro_batch_size=micro, global_batch_size=full, rampup_batch_size=ramp), dp
    starts = sorted(draw(st.sets(st.integers(1, 200), max_size=4)))
    steps = tuple((first, unit * draw(st.integers(1, 6))) for first in (0, *starts))
    return TrainConfig(micro_batch_size=micro, global_batch_size=steps[-1][1], batch_size_steps=steps), dp


def ramped(consumed: int, start: int, increment: int, samples: int, full: int) -> int:
    """The ramp as a formula in exact integers: equal shares of SAMPLES for each size below the full one."""
    if consumed >= samples:
        return full
    return min(full, start + increment * (consumed * ((full - start) // increment) // samples))


@pytest.mark.parametrize("samples", [0, 1, 7, 100])
@pytest.mark.parametrize(("start", "increment", "increments"), [(1, 1, 3), (2, 3, 7), (4, 4, 1)])
def test_the_ramp_is_the_formula_at_every_sample(samples: int, start: int, increment: int, increments: int) -> None:
    full = start + increment * increments
    words = (str(start), str(increment), str(samples))
    train = TrainConfig(micro_batch_size=1, global_batch_size=full, rampup_batch_size=words)
    for consumed in range(samples + 3):
        assert batch_size_at(train, consumed, 1) == ramped(consumed, start, increment, samples, full), consumed


def test_gpt3s_ramp_has_its_published_sizes() -> None:
    train = TrainConfig(micro_batch_size=1, global_batch_size=1536, rampup_batch_size=("16", "16", "5859375"))
    share = 5859375 / 95
    for k in (0, 1, 50, 94):
        assert batch_size_at(train, int(k * share) + 1, 8) == 16 + 16 * k
    assert batch_size_at(train, 0, 8) == 16
    assert batch_size_at(train, 5859375, 8) == 1536
    assert len(batch_size_levels(train, 8)) == 96


@given(trains())
def test_sizes_only_grow_along_a_ramp_and_always_split(case: tuple[TrainConfig, int]) -> None:
    train, dp = case
    sizes = [size for _, size in batch_size_levels(train, dp)]
    assert all(size % (train.micro_batch_size * dp) == 0 for size in sizes)
    assert train.batch_size_steps or sizes == sorted(sizes)


def simulated(train: TrainConfig, dp: int, *, samples: int, consumed: int = 0) -> int:
    """Whole steps within `samples`, one at a time."""
    steps = 0
    while consumed + batch_size_at(train, consumed, dp) <= samples:
        consumed += batch_size_at(train, consumed, dp)
        steps += 1
    return steps


@settings(deadline=None)
@given(trains(), st.integers(0, 600))
def test_iterations_for_samples_counts_whole_steps(case: tuple[TrainConfig, int], samples: int) -> None:
    train, dp = case
    assert iterations_for_samples(train, samples, dp) == simulated(train, dp, samples=samples)


@settings(deadline=None)
@given(trains(), st.integers(0, 600), st.integers(0, 700))
def test_steps_that_are_left_are_whole_steps_from_what_is_consumed(
    case: tuple[TrainConfig, int], samples: int, consumed: int
) -> None:
    """Whatever batches consumed it: 48 samples need not be where a step of these options would begin."""
    train, dp = case
    left = iterations_for_samples(train, samples, dp, consumed=consumed)
    assert left == simulated(train, dp, samples=samples, consumed=consumed)


def test_a_smaller_later_batch_does_not_fill_up_an_earlier_one() -> None:
    train = TrainConfig(micro_batch_size=1, global_batch_size=2, batch_size_steps=((0, 12), (100, 2)))
    assert iterations_for_samples(train, 30, 1) == simulated(train, 1, samples=30) == 2


@settings(deadline=None)
@given(trains(), st.integers(0, 120))
def test_samples_for_iterations_sums_the_sizes(case: tuple[TrainConfig, int], iterations: int) -> None:
    train, dp = case
    consumed = 0
    for _ in range(iterations):
        consumed += batch_size_at(train, consumed, dp)
    assert samples_for_iterations(train, iterations, dp) == consumed
    assert iterations_for_samples(train, consumed, dp) == iterations


def test_the_default_batch_is_one_micro_batch_per_rank() -> None:
    draft = derive(GivenRun(train=GivenTrain(micro_batch_size=3)), 4).train
    train = TrainConfig(micro_batch_size=3, global_batch_size=draft.global_batch_size)
    assert batch_size_at(train, 10, 4) == 12
    assert num_microbatches(train, 10, 4) == 1


def test_microbatches_follow_the_ramp() -> None:
    train = TrainConfig(micro_batch_size=2, global_batch_size=16, rampup_batch_size=("4", "4", "30"))
    assert [num_microbatches(train, consumed, 2) for consumed in (0, 9, 10, 20, 30)] == [1, 1, 2, 3, 4]


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="global batch of 10 after 0 samples is not a multiple of micro-batch 4"):
        num_microbatches(TrainConfig(micro_batch_size=4, global_batch_size=10), 0, 1)


def test_step_schedules_are_read_in_tokens() -> None:
    levels = parse_step_schedule("0:16 2.4B:320,12B:1536", 2048)
    assert levels == ((0, 16), (2_400_000_000 // 2048, 320), (12_000_000_000 // 2048, 1536))


@pytest.mark.parametrize(
    "text", ["", "0", "0:x", "0:16 5", "50:16", "0:16 0:32", "0:16 10K:8 1K:4", "0:0", "-5:3", "infB:2", "nan:1"]
)
def test_malformed_step_schedules_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--step-batch-size-schedule"):
        parse_step_schedule(text, 10)
