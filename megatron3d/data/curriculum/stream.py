"""A curriculum over samples: easy ones first, and the sample of slot k a pure function of k.

The bound of each step (`config/pacing.py`) admits a set of the corpus's fixed samples; the steps with one and the same
set are a plateau. Slot k of the plateau that began with slot k0 takes

    admitted[perm((k - k0) mod n)],   n = the number admitted, perm a seeded permutation, another in each pass over n

so that samples are drawn evenly from all that are admitted, and none comes twice before all have come once. Nothing is
remembered: a resumed run, or one with other data-parallel ranks, computes the same samples. Samples of a corpus are
fixed: cut at the same tokens whenever they come, since an index is of samples. With a warm-up, slots from its end on
are those of the run without a curriculum, by the same numbers.

DeepSpeed's sampler draws the cluster of each sample at random and keeps its place in files; what it admits is the same.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.blend import Blend
from megatron3d.data.curriculum.index import MetricIndex
from megatron3d.data.order import shuffled
from megatron3d.data.stream import SampleStream

FixedSample = TypeVar("FixedSample", covariant=True)
_SETS_KEPT = 2  # intersections of several metrics, n numbers each: those of the batches being read


class FixedSamples(SampleStream[FixedSample], Protocol[FixedSample]):
    """A stream of one corpus that also gives its samples as they are cut without any epoch."""

    @property
    def num_fixed(self) -> int:
        """How many fixed samples there are."""
        ...

    def fixed(self, index: int, draw: int) -> FixedSample:
        """Fixed sample `index`; `draw` seeds what is drawn anew each time it is shown, such as a BERT's masks."""
        ...

    def locate_fixed(self, index: int, position: int) -> str:
        """Where token `position` of fixed sample `index` comes from, in words for an error message."""
        ...


@dataclass(frozen=True)
class Plateau:
    """Slots with one set of admitted samples.

    Attributes:
        first_slot: k0, a sample number of the run.
        first_step: the step it belongs to, from 1 on.
        bounds: the bound of each metric at that step.
    """

    first_slot: int
    first_step: int
    bounds: tuple[float, ...]


class AdmittedSets:
    """The samples of one corpus that pass the bounds of all metrics at once."""

    def __init__(self, indexes: Sequence[MetricIndex], difficulty_types: Sequence[str]) -> None:
        """`difficulty_types` has "value" or "percentile" for each index."""
        self.indexes, self._types = tuple(indexes), tuple(difficulty_types)
        self._lock = threading.Lock()
        self._sets: dict[tuple[int, ...], NDArray[Any]] = {}

    def reaches(self, bounds: Sequence[float]) -> tuple[int, ...]:
        """How far each bound reaches into the order of its metric: what makes two sets equal."""
        return tuple(
            index.num_admitted(bound, kind)
            for index, bound, kind in zip(self.indexes, bounds, self._types, strict=True)
        )

    def samples(self, reaches: tuple[int, ...]) -> NDArray[Any]:
        """The numbers of the admitted samples; of several metrics in the order of the last."""
        if len(reaches) == 1:
            return self.indexes[0].order[: reaches[0]]
        with self._lock:
            found = self._sets.get(reaches)
        if found is None:
            found = self._intersection(reaches)
            with self._lock:
                while len(self._sets) >= _SETS_KEPT:
                    self._sets.pop(next(iter(self._sets)))
                self._sets[reaches] = found
        return found

    def _intersection(self, reaches: tuple[int, ...]) -> NDArray[Any]:
        """O(samples), without sorting: a mark for each metric but the last, which gives the order."""
        marks = np.zeros(self.indexes[0].num_samples, dtype=np.uint8)
        for index, reach in zip(self.indexes[:-1], reaches):
            marks[index.order[:reach]] += 1
        last = self.indexes[-1].order[: reaches[-1]]
        return last[marks[last] == len(reaches) - 1]


class Curriculum(Generic[FixedSample]):
    """The stream of a run with a curriculum; a `SampleStream` of the same kind itself."""

    def __init__(
        self,
        plain: SampleStream[FixedSample],
        corpora: Sequence[FixedSamples[FixedSample]],
        admitted: Sequence[AdmittedSets],
        *,
        plateaus: Sequence[Plateau],
        warmup_slots: int | None,
        seed: int,
    ) -> None:
        """Find, for each corpus, the plateaus on which its own set changes.

        Args:
            plain: the stream without a curriculum: that of the only corpus, or their `Blend`.
            corpora: the streams of the corpora, in the order of the blend.
            admitted: the sets of each.
            plateaus: of the run, in order, the first at slot 0.
            warmup_slots: slots after which `plain` goes on; None where the curriculum lasts.
            seed: of the order of the admitted samples.
        """
        self.plain, self.corpora, self.admitted = plain, tuple(corpora), tuple(admitted)
        self.plateaus, self.warmup_slots, self._seed = tuple(plateaus), warmup_slots, seed
        self._changes = [_changes(plateaus, sets) for sets in self.admitted]

    @property
    def seq_length(self) -> int:
        """S."""
        return self.plain.seq_length

    @property
    def num_samples_per_epoch(self) -> int:
        """That of the plain stream: the corpora once, in any order."""
        return self.plain.num_samples_per_epoch

    def choose(self, number: int) -> tuple[int, int] | None:
        """The corpus and the fixed sample of slot `number`; None behind a warm-up, where `plain` serves it.

        Raises: IndexError for a negative number.
        """
        if number < 0:
            raise IndexError(f"sample {number} of a curriculum: samples are counted from 0")
        if self.warmup_slots is not None and number >= self.warmup_slots:
            return None
        corpus, own_number = self._turn(number)
        changes = self._changes[corpus]
        place = bisect.bisect_right(changes.first_slots, number) - 1
        since = own_number - self._served_before(changes.first_slots[place], corpus)
        samples = self.admitted[corpus].samples(changes.reaches[place])
        passes, turn = divmod(since, len(samples))
        purpose = f"curriculum {corpus} {changes.first_steps[place]}"
        return corpus, int(samples[shuffled(len(samples), self._seed, purpose, passes)[turn]])

    def sample(self, number: int) -> FixedSample:
        """The sample of slot `number`."""
        found = self.choose(number)
        if found is None:
            return self.plain.sample(number)
        corpus, index = found
        return self.corpora[corpus].fixed(index, number)

    def locate(self, number: int, position: int) -> str:
        """Where token `position` of slot `number` comes from."""
        found = self.choose(number)
        if found is None:
            return self.plain.locate(number, position)
        corpus, index = found
        return self.corpora[corpus].locate_fixed(index, position)

    def describe(self) -> str:
        """One line: the plain stream, and the metrics that admit its samples."""
        metrics = ", ".join(index.name for index in self.admitted[0].indexes)
        return f"{self.plain.describe()}, by a curriculum of {metrics}"

    def _turn(self, number: int) -> tuple[int, int]:
        """The corpus of slot `number`, and how many of its own slots came before."""
        return self.plain.choose(number) if isinstance(self.plain, Blend) else (0, number)

    def _served_before(self, slot: int, corpus: int) -> int:
        """Slots of a corpus before `slot`: the count at its next turn, which is never far."""
        found, own_number = self._turn(slot)
        while found != corpus:
            slot += 1
            found, own_number = self._turn(slot)
        return own_number


@dataclass(frozen=True)
class _Changes:
    """The plateaus of one corpus: slots and steps at which its set changes, and how far the bounds reach from there."""

    first_slots: list[int]
    first_steps: list[int]
    reaches: list[tuple[int, ...]]


def _changes(plateaus: Sequence[Plateau], sets: AdmittedSets) -> _Changes:
    found = _Changes([], [], [])
    for plateau in plateaus:
        reaches = sets.reaches(plateau.bounds)
        if not found.reaches or reaches != found.reaches[-1]:
            found.first_slots.append(plateau.first_slot)
            found.first_steps.append(plateau.first_step)
            found.reaches.append(reaches)
    return found
