"""Which samples make up which batch: near-equal lengths together, in an order that is a function of seed and epoch.

An epoch is shuffled, cut into windows of many batches, sorted by length within each window, cut into batches, and the
batches are shuffled. So a batch has little padding, whoever meets whom changes from epoch to epoch, and long and short
batches alternate. Every rank computes the same list from the lengths alone, so all know the shape of every message.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.order import Permutation, derive_seed

_WINDOW_BATCHES = 64  # enough that neighbours have nearly equal lengths; one window of a huge file would mix too little


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch: sample numbers, their weights (0 for rows that only fill it up), and the padded length."""

    indices_G: NDArray[np.int64]
    weights_G: NDArray[np.float32]
    length: int

    def part(self, dp_rank: int, dp_size: int) -> PlannedBatch:
        """The rows of one data-parallel rank, which are as long as those of the others."""
        share = len(self.indices_G) // dp_size
        rows = slice(dp_rank * share, (dp_rank + 1) * share)
        return PlannedBatch(self.indices_G[rows], self.weights_G[rows], self.length)

    @property
    def num_samples(self) -> int:
        """Rows that are samples."""
        return int(self.weights_G.sum())


def training_batches(
    lengths_N: NDArray[np.int64], *, batch_size: int, multiple: int, seed: int, epoch: int
) -> list[PlannedBatch]:
    """The batches of one epoch, each sample in one of them once.

    Args:
        lengths_N: tokens of each sample.
        batch_size: samples of a global batch, G; the one that is short is filled up with rows of weight 0.
        multiple: batches are padded to a multiple of this.
        seed: of the run.
        epoch: from 0.
    """
    count = len(lengths_N)
    shuffled = Permutation(count, derive_seed(seed, "fine-tuning samples", epoch)).many(np.arange(count))
    batches = []
    window = batch_size * _WINDOW_BATCHES
    for first in range(0, count, window):
        members = shuffled[first : first + window]
        ordered = members[np.argsort(lengths_N[members], kind="stable")]
        batches += _cut(ordered, lengths_N, batch_size, multiple)
    order = Permutation(len(batches), derive_seed(seed, "fine-tuning batches", epoch)).many(np.arange(len(batches)))
    return [batches[number] for number in order]


def evaluation_batches(lengths_N: NDArray[np.int64], *, batch_size: int, multiple: int) -> list[PlannedBatch]:
    """All samples once, from short to long."""
    return _cut(np.argsort(lengths_N, kind="stable"), lengths_N, batch_size, multiple)


def num_batches(num_samples: int, batch_size: int) -> int:
    """Batches of one epoch."""
    return -(-num_samples // batch_size)


def padded_share(batches: list[PlannedBatch], lengths_N: NDArray[np.int64]) -> float:
    """The share of positions that are padding or rows without weight, 0 to 1."""
    positions = sum(len(batch.indices_G) * batch.length for batch in batches)
    tokens = sum(float((lengths_N[batch.indices_G] * batch.weights_G).sum()) for batch in batches)
    return 1.0 - tokens / positions


def _cut(
    ordered: NDArray[np.int64], lengths_N: NDArray[np.int64], batch_size: int, multiple: int
) -> list[PlannedBatch]:
    batches = []
    for first in range(0, len(ordered), batch_size):
        members = ordered[first : first + batch_size]
        missing = batch_size - len(members)
        indices = np.concatenate([members, np.repeat(members[:1], missing)])  # the shortest one costs least
        weights = np.concatenate([np.ones(len(members)), np.zeros(missing)]).astype(np.float32)
        longest = int(lengths_N[members].max())
        batches.append(PlannedBatch(indices, weights, -(-longest // multiple) * multiple))
    return batches
