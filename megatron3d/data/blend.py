"""Several corpora as one stream: which corpus serves sample number k is a pure function of k and the weights.

The weights are made integers p_1 .. p_m with the sum q, and the choice repeats every q samples. Within a period the
corpora take turns so fairly that after any number n of samples, corpus i has served more than n*p_i/q - 1 and less
than n*p_i/q + 1 of them. The table of one period (at most 65,536 entries) is all there is to compute; sample
k is then entry k mod q, and the corpus has served p_i samples in each of the k // q whole periods before.

Weights may change on the way (`blend_history.py`): a blend has *segments*, each from its first sample number on with
weights of its own. A corpus then continues after the samples that it served in the segments before, so that none is
repeated and none is lost, and sample k is still a pure function of k and the segments.
"""

from __future__ import annotations

import heapq
import math
import re
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.stream import Sample, SampleStream
from megatron3d.errors import ConfigError, DataError
from megatron3d.files.text import TextError, read_text

MAX_PERIOD = 65536


@dataclass(frozen=True)
class Corpus:
    """One word pair of `--data-path`: a prefix, and its weight or None (then the size decides)."""

    prefix: str
    weight: Fraction | None


def parse_data_path(words: Sequence[str], flag: str) -> tuple[Corpus, ...]:
    """The corpora of `--data-path 0.7 A 0.3 B` or `--data-path A B`; a corpus of weight 0 is left out.

    Weights are read as exact decimals. An odd number of words, or no number in the first place, means no weights.

    Raises: ConfigError if only some corpora have a weight, a weight is negative, or none is left.
    """
    weights = [_as_fraction(word) for word in words[0::2]] if len(words) % 2 == 0 else []
    if not weights or weights[0] is None:
        return tuple(Corpus(word, None) for word in words)
    bad = [words[2 * place] for place, weight in enumerate(weights) if weight is None or weight < 0]
    if bad:
        raise ConfigError(
            f"{flag} {' '.join(words)}: {', '.join(bad)} stands where a weight from 0 up is expected; give either a "
            f"weight before every prefix or no weight at all."
        )
    corpora = tuple(Corpus(prefix, weight) for prefix, weight in zip(words[1::2], weights) if weight)
    if not corpora:
        raise ConfigError(f"{flag} {' '.join(words)}: all weights are 0; give at least one corpus a positive weight.")
    return corpora


def read_data_args_file(path: str) -> tuple[tuple[str, ...], str]:
    """The words of `--data-args-path`, and the flag to name in messages. Raises: DataError if it cannot be read."""
    flag = f"--data-args-path {path}"
    if not Path(path).is_file():
        raise DataError(f"{flag} cannot be found; give a file with the words of --data-path, such as 0.7 A 0.3 B.")
    try:
        # Spaces and line ends alone part words: names of files may hold other characters that Unicode counts as space.
        words = tuple(filter(None, re.split(r"[ \t\r\n]+", read_text(Path(path)))))
    except (OSError, TextError) as error:
        raise DataError(f"{flag} cannot be read ({error}).") from error
    if not words:
        raise DataError(f"{flag} is empty; write the words of --data-path into it, such as 0.7 A 0.3 B.")
    return words, flag


def tempered(num_tokens: Sequence[int], temperature: float) -> tuple[Fraction | int, ...]:
    """Weights in the proportion of n^(1/T) for corpora of n tokens and the temperature T, above 0.

    T = 1 gives the sizes themselves, exactly. A larger T reads small corpora more often than their size: alpha = 1/T
    is the exponent of XLM-R (0.3) and mT5 (0.3).

    Source: A. Conneau et al., Unsupervised Cross-lingual Representation Learning at Scale (2020), section 3.1.
    """
    if temperature == 1:
        return tuple(num_tokens)
    largest = max(num_tokens)
    # A power that underflows stays above 0, which would take the corpus out of the blend.
    return tuple(Fraction(max((count / largest) ** (1 / temperature), sys.float_info.min)) for count in num_tokens)


def integer_weights(weights: Sequence[Fraction | int]) -> tuple[int, ...]:
    """Positive integers in the proportion of `weights`, exactly if their sum is then at most 65,536.

    Else each weight is rounded to a multiple of 1/65,536, at least one, and the largest takes up the difference.
    """
    exact = [Fraction(weight) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    numbers = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*numbers)
    numbers = [number // divisor for number in numbers]
    total = sum(numbers)
    if total <= MAX_PERIOD:
        return tuple(numbers)
    rounded = [max(1, round(Fraction(number * MAX_PERIOD, total))) for number in numbers]
    largest = rounded.index(max(rounded))
    rounded[largest] += MAX_PERIOD - sum(rounded)
    return tuple(rounded)


def fair_turns(weights: Sequence[int]) -> NDArray[np.int32]:
    """Whose turn it is at each of the sum(weights) places of a period, int32.

    Turn j of corpus i may not come before place floor(j*q/p_i) and must be over by place ceil((j+1)*q/p_i); of those
    that may, the one that must be over first goes first (ties: the earlier corpus). As the shares sum to 1, all are
    in time and no place stays empty, which bounds the error by one sample at every prefix.

    Source: R. Tijdeman, The chairman assignment problem (1980); the windows are those of S. Baruah et al.,
    Proportionate progress: a notion of fairness in resource allocation (1996).
    """
    period = sum(weights)
    turns = np.empty(period, dtype=np.int32)
    waiting = [(0, corpus, 0) for corpus in range(len(weights))]
    ready: list[tuple[int, int, int]] = []
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, corpus, turn = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(turn + 1) * period // weights[corpus]), corpus, turn))
        _, corpus, turn = heapq.heappop(ready)
        turns[place] = corpus
        heapq.heappush(waiting, ((turn + 1) * period // weights[corpus], corpus, turn + 1))
    return turns


@dataclass(frozen=True)
class BlendSegment:
    """The weights of a blend from one sample number on: an integer for each corpus, 0 for one that is not read."""

    first_sample: int
    weights: tuple[int, ...]

    @cached_property
    def _period(self) -> _Period:
        return _period_of(self.weights)

    def choose(self, offset: int) -> tuple[int, int]:
        """Which corpus serves sample `first_sample + offset`, and how many it served in this segment before."""
        period = self._period
        periods, place = divmod(offset, len(period.turns))
        corpus = int(period.turns[place])
        return corpus, periods * self.weights[corpus] + int(period.served[place])

    def served(self, num_samples: int) -> tuple[int, ...]:
        """How many of the first `num_samples` of this segment each corpus serves."""
        turns = self._period.turns
        periods, place = divmod(num_samples, len(turns))
        begun = np.bincount(turns[:place], minlength=len(self.weights)).tolist()
        return tuple(periods * weight + more for weight, more in zip(self.weights, begun, strict=True))


class BlendOrder:
    """Which corpus serves which sample, over all segments."""

    def __init__(self, segments: Sequence[BlendSegment]) -> None:
        """Count what each segment but the last serves in all.

        Raises: ValueError if the segments do not rise from sample 0, or give no weight or different numbers of them.
        """
        self.segments = tuple(segments)
        self._firsts = [one.first_sample for one in self.segments]
        if self._firsts[:1] != [0] or any(later <= earlier for earlier, later in pairwise(self._firsts)):
            raise ValueError(f"segments of a blend begin at the samples {self._firsts}, which do not rise from 0")
        if len({len(one.weights) for one in self.segments}) != 1:
            raise ValueError(f"segments of a blend have different numbers of weights: {self.segments}")
        self._before = [(0,) * len(self.segments[0].weights)]
        for earlier, later in pairwise(self.segments):
            served = earlier.served(later.first_sample - earlier.first_sample)
            self._before.append(tuple(map(sum, zip(self._before[-1], served, strict=True))))

    @classmethod
    def constant(cls, weights: Sequence[int]) -> BlendOrder:
        """The order of weights that never change."""
        return cls([BlendSegment(0, tuple(weights))])

    def choose(self, number: int) -> tuple[int, int]:
        """Which corpus serves sample `number`, and with which of its own. Raises: IndexError for a negative number."""
        if number < 0:
            raise IndexError(f"sample {number} of a blend: samples are counted from 0")
        place = bisect_right(self._firsts, number) - 1
        corpus, own_number = self.segments[place].choose(number - self._firsts[place])
        return corpus, self._before[place][corpus] + own_number

    def served(self, num_samples: int) -> tuple[int, ...]:
        """How many of the first `num_samples` each corpus serves."""
        place = max(0, bisect_right(self._firsts, num_samples) - 1)
        more = self.segments[place].served(num_samples - self._firsts[place])
        return tuple(map(sum, zip(self._before[place], more, strict=True)))


class Blend(Generic[Sample]):
    """The streams of several corpora mixed by integer weights; a `SampleStream` of the same kind itself."""

    def __init__(self, streams: Sequence[SampleStream[Sample] | None], order: BlendOrder) -> None:
        """A stream for each corpus of the order; None for one that the last segment does not read."""
        self.streams, self.order = tuple(streams), order
        self.weights = order.segments[-1].weights
        read = [stream for stream, weight in zip(streams, self.weights) if weight]
        if len(streams) != len(self.weights) or None in read:
            raise ValueError(f"{len(streams)} streams with the weights {list(self.weights)}")
        self._read = [stream for stream in read if stream is not None]

    @property
    def seq_length(self) -> int:
        """S, the same in all corpora."""
        return self._read[0].seq_length

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples of one epoch of every corpus together; weights decide how far each is read by then."""
        return sum(stream.num_samples_per_epoch for stream in self._read)

    def choose(self, number: int) -> tuple[int, int]:
        """Which corpus serves sample `number`, and with which of its own samples."""
        return self.order.choose(number)

    def sample(self, number: int) -> Sample:
        """A sample of the corpus whose turn it is. Raises: DataError if only earlier segments read that corpus."""
        corpus, own_number = self.choose(number)
        return self._stream(corpus, number).sample(own_number)

    def locate(self, number: int, position: int) -> str:
        """Where token `position` of sample `number` comes from."""
        corpus, own_number = self.choose(number)
        return self._stream(corpus, number).locate(own_number, position)

    def describe(self) -> str:
        """One line: each corpus with its share."""
        period = sum(self.weights)
        shares = [weight / period for weight in self.weights if weight]
        return "; ".join(f"{share:.4%} {stream.describe()}" for share, stream in zip(shares, self._read, strict=True))

    def _stream(self, corpus: int, number: int) -> SampleStream[Sample]:
        stream = self.streams[corpus]
        if stream is None:
            raise DataError(
                f"sample {number} is of corpus {corpus} of the blend, which has left it since; samples from "
                f"{self.order.segments[-1].first_sample} on can be read."
            )
        return stream


@dataclass(frozen=True)
class _Period:
    """Whose turn it is at each place, and how many samples before it in the period belong to the same corpus."""

    turns: NDArray[np.int32]
    served: NDArray[np.int64]


@lru_cache(maxsize=32)
def _period_of(weights: tuple[int, ...]) -> _Period:
    """The table of one period of weights of which some may be 0. Raises: ValueError if all are, or one is negative."""
    if min(weights, default=0) < 0 or not any(weights):
        raise ValueError(f"weights of a blend are {list(weights)}; at least one must be positive and none negative")
    read = np.flatnonzero(weights).astype(np.int32)
    turns = read[fair_turns([weights[corpus] for corpus in read])]
    served = np.empty(len(turns), dtype=np.int64)
    for corpus in read:
        served[turns == corpus] = np.arange(weights[corpus])
    return _Period(turns, served)


def _as_fraction(word: str) -> Fraction | None:
    """The number that `word` spells, exactly, or None if it is no finite number."""
    try:
        return Fraction(word)
    except (ValueError, ZeroDivisionError):
        return None
