"""Megatron-LM's order of several corpora: sample k comes from the corpus that is furthest behind its share.

Of the corpora with shares w_i (summing to 1) and c_i samples served so far, sample k is the next one of the corpus with
the largest w_i * max(k, 1) - c_i in fp64, of equals the first. That is a loop over samples, each step of which needs
the one before. Here it runs in lanes: the samples are cut into stretches, all of which take a step at once, each from
counts that are guessed. A stretch's guess is right if it is what the stretch before ends with; the others are run
again from there. The rule forgets where it started within a few turns of each corpus, so a few rounds do (2 to 8 were
seen, the last ones of few stretches), and the result is the loop's in any case.

Source: `build_blending_indices` in NVIDIA/Megatron-LM, megatron/core/datasets/helpers.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.megatron_samples import MegatronSamples, past_the_end
from megatron3d.errors import DataError

_MIN_STRETCH, _MAX_STRETCHES = 512, 4096


@dataclass(frozen=True)
class MegatronCorpus:
    """What one corpus gives to one split: sequences, and its weight or None (then the size decides)."""

    dataset: IndexedDataset
    sequences: range
    weight: float | None


def megatron_stream(
    corpora: Sequence[MegatronCorpus], *, num_samples: int, seq_length: int, seed: int, surplus: float, cut: bool
) -> MegatronSamples | MegatronBlend:
    """The stream of one split of a run that asks for `num_samples` of it.

    `surplus` is the share of samples beyond its own that each corpus of a blend is asked for, so that it has enough.
    `cut` says that the splits are parts of the same corpora; there a single corpus with a weight is a blend of one.

    Raises: DataError if a corpus has too few tokens, or fewer samples than the blend takes.

    Source: `BlendedMegatronDatasetBuilder` in NVIDIA/Megatron-LM, blended_megatron_dataset_builder.py.
    """

    def samples(corpus: MegatronCorpus, wanted: int | None) -> MegatronSamples:
        return MegatronSamples(corpus.dataset, corpus.sequences, seq_length=seq_length, seed=seed, num_samples=wanted)

    given = [corpus.weight for corpus in corpora if corpus.weight is not None]
    if len(corpora) == 1 and not (given and cut):
        return samples(corpora[0], num_samples)
    if not given:
        streams = [samples(corpus, None) for corpus in corpora]
        sizes = [len(stream) for stream in streams]
        return MegatronBlend(streams, sizes, min(num_samples, sum(sizes)))
    weights = normalized(given)
    targets = [math.ceil(num_samples * weight) for weight in weights]
    streams = [samples(corpus, math.ceil(target * (1 + surplus))) for corpus, target in zip(corpora, targets)]
    return MegatronBlend(streams, weights, sum(targets))


class MegatronBlend:
    """Several corpora in Megatron-LM's order; a `SampleStream` that ends after `len()` samples.

    turns: int16, which corpus serves each sample. Which of its own samples that is follows from how many it served
    before the stretch, and a count within the stretch.
    """

    def __init__(self, streams: Sequence[MegatronSamples], weights: Sequence[float], size: int) -> None:
        """Compute whose turn it is for `size` samples.

        Raises: DataError if a corpus would have to serve more samples than it has, as in Megatron-LM.
        """
        self.streams, self.weights = tuple(streams), normalized(weights)
        self.turns, self._served = neediest_turns(self.weights, size)
        self._stretch = _stretch_of(size)
        for stream, wanted in zip(self.streams, np.bincount(self.turns, minlength=len(streams)).tolist()):
            if wanted > len(stream):
                raise DataError(
                    f"{stream.dataset.prefix} has {len(stream)} samples in Megatron-LM's order, but the blend takes "
                    f"{wanted}; give --mid-level-dataset-surplus the value of the run in Megatron-LM, or a larger one."
                )

    def __len__(self) -> int:
        """The samples that there are."""
        return len(self.turns)

    @property
    def seq_length(self) -> int:
        """S, the same in all corpora."""
        return self.streams[0].seq_length

    @property
    def num_tokens(self) -> int:
        """The tokens of all corpora together."""
        return sum(stream.num_tokens for stream in self.streams)

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples of one epoch of every corpus together."""
        return sum(stream.num_samples_per_epoch for stream in self.streams)

    def choose(self, number: int) -> tuple[int, int]:
        """Which corpus serves sample `number`, and with which of its own samples.

        Raises: IndexError for a negative number; DataError behind the last sample.
        """
        if number < 0:
            raise IndexError(f"sample {number} of a blend: samples are counted from 0")
        if number >= len(self):
            raise past_the_end(number, len(self), "the blend")
        corpus, stretch = int(self.turns[number]), number // self._stretch
        within = np.count_nonzero(self.turns[stretch * self._stretch : number] == corpus)
        return corpus, int(self._served[stretch, corpus]) + int(within)

    def sample(self, number: int) -> NDArray[np.int64]:
        """The S + 1 tokens of sample `number`, int64. Raises: as `choose` does, and `MegatronSamples.sample`."""
        corpus, own_number = self.choose(number)
        return self.streams[corpus].sample(own_number)

    def locate(self, number: int, position: int) -> str:
        """Where token `position` of sample `number` comes from."""
        corpus, own_number = self.choose(number)
        return self.streams[corpus].locate(own_number, position)

    def describe(self) -> str:
        """One line: each corpus with its share."""
        return "; ".join(f"{weight:.4%} {stream.describe()}" for weight, stream in zip(self.weights, self.streams))


def normalized(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum, in fp64 as Megatron-LM does it: another rounding would be another order."""
    values = np.array(weights, dtype=np.float64)
    return (values / np.sum(values)).tolist()


def neediest_turns(weights: Sequence[float], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Which corpus serves each of `size` samples, int16 [size]; and how many samples each corpus served before each
    stretch of samples, int64 [stretches, corpora].
    """
    stretch = _stretch_of(size)
    firsts_L = np.arange(0, max(size, 1), stretch, dtype=np.int64)
    turns_LK = np.zeros((len(firsts_L), stretch), dtype=np.int16)
    weights_C = np.array(weights, dtype=np.float64)
    served_LC = np.floor(weights_C * firsts_L[:, None]).astype(np.int64)
    served_LC[:, np.argmax(weights_C)] += firsts_L - served_LC.sum(axis=1)
    wrong_L = np.arange(len(firsts_L))
    while len(wrong_L):
        ends_LC = _run(weights_C, firsts_L[wrong_L], served_LC[wrong_L], turns_LK, wrong_L)
        followers_L = wrong_L + 1
        exists_L = followers_L < len(firsts_L)
        followers_L, ends_LC = followers_L[exists_L], ends_LC[exists_L]
        differs_L = (served_LC[followers_L] != ends_LC).any(axis=1)
        wrong_L = followers_L[differs_L]
        served_LC[wrong_L] = ends_LC[differs_L]
    return turns_LK.reshape(-1)[:size], served_LC


def _run(
    weights_C: NDArray[np.float64],
    firsts_L: NDArray[np.int64],
    served_LC: NDArray[np.int64],
    turns_LK: NDArray[np.int16],
    lanes_L: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Run the stretches `lanes_L` side by side: their turns go into `turns_LK`, the counts at their ends come back."""
    counts_LC = served_LC.astype(np.float64)
    rows_L = np.arange(len(lanes_L))
    for step in range(turns_LK.shape[1]):
        numbers_L = np.maximum(firsts_L + step, 1).astype(np.float64)
        chosen_L = np.argmax(weights_C * numbers_L[:, None] - counts_LC, axis=1)
        counts_LC[rows_L, chosen_L] += 1
        turns_LK[lanes_L, step] = chosen_L
    return counts_LC.astype(np.int64)


def _stretch_of(size: int) -> int:
    """Samples of a stretch."""
    return max(_MIN_STRETCH, -(-size // _MAX_STRETCHES))
