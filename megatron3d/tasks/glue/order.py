"""Which samples make up which step: near-equal lengths together, in an order that is a function of seed and epoch.

An epoch is shuffled, cut into windows of many steps, sorted by length within each window, cut into batches, and the
batches are shuffled; one or several of them make up a step. So a batch has little padding, whoever meets whom changes
from epoch to epoch, and long and short batches alternate. Every rank computes the same list from the lengths alone, so
all know the shape of every message.

A batch of one length is no fair sample: short texts differ from long ones, and the gradient of a step that sees one
kind alone is noisier than its size suggests. Several small batches in a step, each of another length, mend that without
padding.

Shapes: N samples of a file, R rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.order import Permutation, derive_seed

_WINDOW_STEPS = 64  # enough that neighbours have nearly equal lengths; one window of a huge file would mix too little


@dataclass(frozen=True)
class PlannedBatch:
    """Samples padded to one length: their numbers, and their weights (0 for rows that only fill the batch up)."""

    indices_R: NDArray[np.int64]
    weights_R: NDArray[np.float32]
    length: int

    def part(self, dp_rank: int, dp_size: int) -> PlannedBatch:
        """The rows of one data-parallel rank, which are as long as those of the others."""
        share = len(self.indices_R) // dp_size
        rows = slice(dp_rank * share, (dp_rank + 1) * share)
        return PlannedBatch(self.indices_R[rows], self.weights_R[rows], self.length)

    @property
    def num_samples(self) -> int:
        """Rows that are samples."""
        return int(self.weights_R.sum())

    def num_tokens(self, lengths_N: NDArray[np.int64]) -> int:
        """Tokens of its samples, without padding; `lengths_N` are those of all samples."""
        return int((lengths_N[self.indices_R] * self.weights_R).sum())

    def lengths(self, lengths_N: NDArray[np.int64]) -> list[int]:
        """Tokens of each of its samples, without padding."""
        return lengths_N[self.indices_R[self.weights_R > 0]].tolist()


@dataclass(frozen=True)
class PlannedStep:
    """A global batch, as one or several batches, each of a length of its own."""

    batches: tuple[PlannedBatch, ...]

    def part(self, dp_rank: int, dp_size: int) -> PlannedStep:
        """One data-parallel rank's rows of each batch."""
        return PlannedStep(tuple(batch.part(dp_rank, dp_size) for batch in self.batches))

    @property
    def num_samples(self) -> int:
        """Rows that are samples."""
        return sum(batch.num_samples for batch in self.batches)

    def num_tokens(self, lengths_N: NDArray[np.int64]) -> int:
        """Tokens of its samples, without padding; `lengths_N` are those of all samples."""
        return sum(batch.num_tokens(lengths_N) for batch in self.batches)

    def lengths(self, lengths_N: NDArray[np.int64]) -> list[int]:
        """Tokens of each of its samples, without padding."""
        return [length for batch in self.batches for length in batch.lengths(lengths_N)]


def training_steps(
    lengths_N: NDArray[np.int64], *, step_size: int, group_size: int, multiple: int, seed: int, epoch: int
) -> list[PlannedStep]:
    """The steps of one epoch, each sample in one of them once.

    Args:
        lengths_N: tokens of each sample.
        step_size: samples of a global batch; what is missing in the last one are rows of weight 0.
        group_size: samples of near-equal length that stay together, a divisor of `step_size`.
        multiple: batches are padded to a multiple of this.
        seed: of the run.
        epoch: from 0.
    """
    count = len(lengths_N)
    shuffled = Permutation(count, derive_seed(seed, "fine-tuning samples", epoch)).many(np.arange(count))
    batches = []
    window = step_size * _WINDOW_STEPS
    for first in range(0, count, window):
        members = shuffled[first : first + window]
        ordered = members[np.argsort(lengths_N[members], kind="stable")]
        batches += _cut(ordered, lengths_N, group_size, multiple)
    order = Permutation(len(batches), derive_seed(seed, "fine-tuning batches", epoch)).many(np.arange(len(batches)))
    batches = [batches[number] for number in order]
    per_step = step_size // group_size
    batches += [_filler(lengths_N, group_size, multiple)] * (-len(batches) % per_step)
    return [PlannedStep(tuple(batches[first : first + per_step])) for first in range(0, len(batches), per_step)]


def evaluation_batches(lengths_N: NDArray[np.int64], *, batch_size: int, multiple: int) -> list[PlannedBatch]:
    """All samples once, from short to long."""
    return _cut(np.argsort(lengths_N, kind="stable"), lengths_N, batch_size, multiple)


def num_steps(num_samples: int, step_size: int) -> int:
    """Steps of one epoch."""
    return -(-num_samples // step_size)


def padded_share(steps: list[PlannedStep], lengths_N: NDArray[np.int64]) -> float:
    """The share of positions that are padding or rows without weight, 0 to 1."""
    positions = sum(len(batch.indices_R) * batch.length for step in steps for batch in step.batches)
    return 1.0 - sum(step.num_tokens(lengths_N) for step in steps) / positions


def _cut(
    ordered: NDArray[np.int64], lengths_N: NDArray[np.int64], batch_size: int, multiple: int
) -> list[PlannedBatch]:
    batches = []
    for first in range(0, len(ordered), batch_size):
        members = ordered[first : first + batch_size]
        missing = batch_size - len(members)
        indices = np.concatenate([members, np.repeat(members[:1], missing)])  # the shortest one costs least
        weights = np.concatenate([np.ones(len(members)), np.zeros(missing)]).astype(np.float32)
        batches.append(PlannedBatch(indices, weights, _padded(int(lengths_N[members].max()), multiple)))
    return batches


def _filler(lengths_N: NDArray[np.int64], batch_size: int, multiple: int) -> PlannedBatch:
    """A batch that counts nothing, for a step that has too few."""
    shortest = int(lengths_N.argmin())
    length = _padded(int(lengths_N[shortest]), multiple)
    return PlannedBatch(np.full(batch_size, shortest), np.zeros(batch_size, dtype=np.float32), length)


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
