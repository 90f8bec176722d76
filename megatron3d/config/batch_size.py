"""The global batch size as a function of the samples consumed so far, and the arithmetic of iterations and samples.

A run's batch sizes are *levels*: from this many consumed samples on, steps take this many samples. A constant batch is
one level; `--rampup-batch-size START INCREMENT SAMPLES` rises from START by INCREMENT in equal shares of SAMPLES, as
Megatron-LM ramps; `--step-batch-size-schedule` lists its levels. All numbers are exact integers, so every rank and
every resumed run gets the same sizes.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from itertools import pairwise

from megatron3d.config.sections.train import DraftTrain, TrainConfig
from megatron3d.errors import ConfigError

Level = tuple[int, int]

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def batch_size_levels(train: DraftTrain, data_parallel_size: int) -> tuple[Level, ...]:
    """(first consumed sample, global batch size) of each level, from 0 on and in rising order of samples.

    The global batch size must be known.
    """
    if train.batch_size_steps:
        return train.batch_size_steps
    full = train.global_batch_size
    assert full is not None, "levels are asked for where the global batch size is derived"
    if not train.rampup_batch_size:
        return ((0, full),)
    start, increment, ramp_samples = (int(word) for word in train.rampup_batch_size)
    num_increments = (full - start) // increment
    if num_increments <= 0 or ramp_samples <= 0:
        return ((0, full),)
    # Level k starts at the first sample count with count x num_increments >= k x ramp_samples: a ceiling.
    levels = [(-(-k * ramp_samples // num_increments), start + k * increment) for k in range(num_increments)]
    return (*levels, (ramp_samples, full))


def batch_size_at(train: DraftTrain, consumed_samples: int, data_parallel_size: int) -> int:
    """Samples of the optimizer step that starts after `consumed_samples`."""
    size = 0
    for first_sample, level_size in batch_size_levels(train, data_parallel_size):
        if consumed_samples >= first_sample:
            size = level_size
    return size


def num_microbatches(train: TrainConfig, consumed_samples: int, data_parallel_size: int) -> int:
    """Microbatches of each data-parallel rank in the step that starts after `consumed_samples`.

    Raises: ConfigError if the batch of that step is not a multiple of micro-batch x data-parallel size.
    """
    size = batch_size_at(train, consumed_samples, data_parallel_size)
    samples_at_once = train.micro_batch_size * data_parallel_size
    if size % samples_at_once:
        raise ConfigError(
            f"The global batch of {size} after {consumed_samples} samples is not a multiple of micro-batch "
            f"{train.micro_batch_size} x data-parallel {data_parallel_size} = {samples_at_once}; change "
            f"--global-batch-size, --rampup-batch-size or --step-batch-size-schedule to multiples of it."
        )
    return size // samples_at_once


def iterations_for_samples(train: DraftTrain, samples: int, data_parallel_size: int, *, consumed: int = 0) -> int:
    """Whole optimizer steps that fit into `samples`; the last incomplete batch is left out, as in Megatron-LM.

    With `consumed` of the samples used already, whatever the batches were, the steps that are left.
    """
    iterations = 0
    for size, last_sample in _spans(train, data_parallel_size, end=samples):
        # Steps start below the next level's first sample, and the last of them may reach beyond it.
        assert last_sample is not None, "`end` closes the last level"
        steps = max(0, min(-(-(last_sample - consumed) // size), (samples - consumed) // size))
        iterations += steps
        consumed += steps * size
        if consumed < last_sample:
            break
    return iterations


def samples_for_iterations(train: DraftTrain, iterations: int, data_parallel_size: int, *, consumed: int = 0) -> int:
    """Samples consumed after `iterations` steps that follow the first `consumed` samples."""
    for size, last_sample in _spans(train, data_parallel_size, end=None):
        steps = iterations if last_sample is None else min(iterations, max(0, -(-(last_sample - consumed) // size)))
        iterations -= steps
        consumed += steps * size
    return consumed


def parse_step_schedule(text: str, seq_length: int) -> tuple[Level, ...]:
    """Levels in samples from `TOKENS:SIZE` pairs such as "0:16 2.4B:320 12B:1536" (spaces or commas between them).

    Token counts may end in K, M, B or T; they become samples by floor division by `seq_length`.

    Raises: ConfigError if a pair is malformed, the first does not start at 0, or the counts do not rise.
    """
    levels = tuple(_parse_pair(pair, text, seq_length) for pair in text.replace(",", " ").split())
    starts = [first_sample for first_sample, _ in levels]
    if not levels or starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
        raise ConfigError(
            f"--step-batch-size-schedule '{text}' must start at 0 tokens and rise by at least one sequence from "
            "pair to pair; write it like '0:16 2.4B:320 12B:1536'."
        )
    return levels


def _parse_pair(pair: str, text: str, seq_length: int) -> Level:
    tokens, _, size = pair.partition(":")
    scale = _SUFFIXES.get(tokens[-1:].upper(), 1)
    digits = tokens[:-1] if scale > 1 else tokens
    try:
        level = int(Decimal(digits) * scale) // seq_length, int(size)
    except (InvalidOperation, ValueError, OverflowError):
        level = (-1, 0)
    if level[0] < 0 or level[1] < 1:
        raise ConfigError(
            f"--step-batch-size-schedule '{text}' has the pair '{pair}', which is not TOKENS:SIZE; write it like "
            "'0:16 2.4B:320 12B:1536'."
        )
    return level


def _spans(train: DraftTrain, data_parallel_size: int, *, end: int | None) -> list[tuple[int, int | None]]:
    """(batch size, first consumed sample of the next level) for each level; `end` closes the last one."""
    levels = batch_size_levels(train, data_parallel_size)
    ends = [first_sample for first_sample, _ in levels[1:]]
    return [(size, last) for (_, size), last in zip(levels, [*ends, end])]
