"""Megatron-LM's own order of one corpus: its sample k is ours for every k, so that a run can move over midway.

The numbers of the sequences are repeated for E epochs and shuffled together; the sequences in that order are one long
row of tokens, sample i is the S + 1 tokens from i*S on, and a second shuffle says which i is sample k. Where only a
small part of the last epoch is needed, that epoch stays out of both shuffles and is shuffled by itself behind the
others. All shuffles are drawn one after the other from one `numpy.random.RandomState(seed)`, whose stream numpy keeps.

How many samples the run asks for decides E and with it the whole order: it is part of the order's identity, and what
it has no number for does not exist. Each process builds the tables for itself: per epoch 4 bytes a sequence and 8 for
where it begins, and 4 bytes a sample.

Source: NVIDIA/Megatron-LM, megatron/core/datasets/gpt_dataset.py and helpers.cpp, core 0.16.1 to 0.20.0. There the
begin of each sample is stored as (document, offset); here it is found by a binary search, which gives the same tokens.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.indexed import IndexedDataset
from megatron3d.errors import DataError

_SEPARATE_BELOW = 0.80  # of an epoch's samples: with fewer from the last epoch, it is shuffled by itself


class MegatronSamples:
    """The samples of `sequences` (numbers in a row) of one token file in Megatron-LM's order; a `SampleStream`.

    Unlike other streams it ends: `len()` samples exist, at least as many as were asked for.

    num_tokens: T, the tokens of the split. num_epochs: E.
    """

    def __init__(
        self, dataset: IndexedDataset, sequences: range, *, seq_length: int, seed: int, num_samples: int | None
    ) -> None:
        """Draw the order for a run that asks for `num_samples` of this corpus; None asks for one epoch.

        Raises: DataError if the sequences hold no token, or too few for the one epoch that is asked for.
        """
        self.dataset, self.sequences, self.seq_length = dataset, sequences, seq_length
        lengths = dataset.lengths[sequences.start : sequences.stop]
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        self.num_epochs = self._epochs_for(num_samples)
        generator = np.random.RandomState(seed)
        samples_before_last = self._samples_in(self.num_epochs - 1)
        is_separate = self.num_epochs > 1 and (num_samples or 0) - samples_before_last < int(
            _SEPARATE_BELOW * self._samples_in(1)
        )
        counts = [self.num_epochs - 1, 1] if is_separate else [self.num_epochs]
        self._order = np.concatenate([_shuffled_epochs(sequences, count, generator) for count in counts])
        self._starts = np.zeros(len(self._order) + 1, dtype=np.int64)
        np.cumsum(lengths[self._order - sequences.start], dtype=np.int64, out=self._starts[1:])
        total = self._samples_in(self.num_epochs)
        bounds = [0, samples_before_last, total] if is_separate else [0, total]
        self._shuffle = _shuffled_ranges(bounds, generator)

    def __len__(self) -> int:
        """The samples that there are."""
        return len(self._shuffle)

    @property
    def num_samples_per_epoch(self) -> int:
        """About the samples of one epoch, at least 1: the last sample of an epoch goes on into the next."""
        return max(1, self._samples_in(1))

    def sample(self, number: int) -> NDArray[np.int64]:
        """The S + 1 tokens of sample `number`, int64.

        Raises: IndexError for a negative number; DataError behind the last sample, or if the file was cut short.
        """
        first_token, count = self._first_token(number), self.seq_length + 1
        place = int(np.searchsorted(self._starts, first_token, side="right")) - 1
        offset = first_token - int(self._starts[place])
        tokens = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            available = int(self._starts[place + 1] - self._starts[place]) - offset
            taken = min(available, count - filled)
            tokens[filled : filled + taken] = self.dataset.get(int(self._order[place]), offset, taken)
            filled, place, offset = filled + taken, place + 1, 0
        return tokens

    def locate(self, number: int, position: int) -> str:
        """File, document, sequence and offset of token `position` of sample `number`."""
        token = self._first_token(number) + position
        place = int(np.searchsorted(self._starts, token, side="right")) - 1
        sequence, offset = int(self._order[place]), token - int(self._starts[place])
        document = int(np.searchsorted(self.dataset.document_bounds, sequence, side="right")) - 1
        return f"{self.dataset.bin_path}, document {document}, sequence {sequence}, token {offset}"

    def describe(self) -> str:
        """Sequences, tokens, epochs and samples."""
        return (
            f"{self.dataset.prefix}: sequences {self.sequences.start} to {self.sequences.stop}, {self.num_tokens:,} "
            f"tokens, {len(self):,} samples of {self.seq_length} in {self.num_epochs} epochs, in Megatron-LM's order"
        )

    def _samples_in(self, epochs: int) -> int:
        """Samples of so many epochs in a row; of none, as Megatron-LM computes it, -1."""
        return (epochs * self.num_tokens - 1) // self.seq_length

    def _epochs_for(self, num_samples: int | None) -> int:
        """The fewest epochs that hold `num_samples` and one token more, at least one."""
        if self.num_tokens == 0:
            raise DataError(
                f"{self.dataset.prefix}: sequences {self.sequences.start} to {self.sequences.stop} hold no token, so "
                f"no number of epochs holds a sample; give this split more of the corpus with --split, or add data."
            )
        if num_samples is None:
            if self.num_tokens < self.seq_length + 1:
                raise DataError(
                    f"{self.dataset.prefix}: sequences {self.sequences.start} to {self.sequences.stop} hold "
                    f"{self.num_tokens} tokens, but one sample of --seq-length {self.seq_length} needs "
                    f"{self.seq_length + 1}; lower --seq-length, give this split more of the corpus with --split, or "
                    f"give the corpora weights, so that they are read several times."
                )
            return 1
        return max(1, -(-(num_samples * self.seq_length + 1) // self.num_tokens))

    def _first_token(self, number: int) -> int:
        """Where in the row of E*T tokens sample `number` begins."""
        if number < 0:
            raise IndexError(f"sample {number} of {self.dataset.prefix}: samples are counted from 0")
        if number >= len(self):
            raise past_the_end(number, len(self), self.dataset.prefix)
        return int(self._shuffle[number]) * self.seq_length


def past_the_end(number: int, length: int, what: str) -> DataError:
    """The error of a sample that Megatron-LM's order does not have."""
    return DataError(
        f"{what}: sample {number} was asked for, but Megatron-LM's order ends after {length} samples; end the run "
        f"there, or read on in another order with --sample-order computed and --override-sample-order."
    )


def _shuffled_epochs(sequences: range, epochs: int, generator: np.random.RandomState) -> NDArray[np.int32]:
    """The numbers of all sequences once an epoch, all shuffled together."""
    order = np.tile(np.arange(sequences.start, sequences.stop, dtype=np.int32), epochs)
    generator.shuffle(order)
    return order


def _shuffled_ranges(bounds: list[int], generator: np.random.RandomState) -> NDArray[np.integer]:
    """The numbers from each bound to the next, shuffled among themselves, in a row."""
    dtype = np.int64 if bounds[-1] >= np.iinfo(np.uint32).max - 1 else np.uint32
    parts = [np.arange(first, last, dtype=dtype) for first, last in pairwise(bounds)]
    for part in parts:
        generator.shuffle(part)
    return np.concatenate(parts)
