"""Several corpora as one stream: which corpus serves sample number k is a pure function of k and the weights.

The weights are made integers p_1 .. p_m with the sum q, and the choice repeats every q samples. Within a period the
corpora take turns so fairly that after any number n of samples, corpus i has served more than n*p_i/q - 1 and less
than n*p_i/q + 1 of them. The table of one period (at most 65,536 entries) is all there is to compute; sample
k is then entry k mod q, and the corpus has served p_i samples in each of the k // q whole periods before.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
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


class Blend(Generic[Sample]):
    """The streams of several corpora mixed by integer weights; a `SampleStream` of the same kind itself."""

    def __init__(self, streams: Sequence[SampleStream[Sample]], weights: Sequence[int]) -> None:
        """Compute the table of one period. `weights` are positive, see `integer_weights`."""
        if len(streams) != len(weights) or min(weights) < 1:
            raise ValueError(f"{len(streams)} streams with the weights {list(weights)}")
        self.streams, self.weights = tuple(streams), tuple(weights)
        self._turns = fair_turns(weights)
        # entry k: how many samples of the period before place k belong to the same corpus
        self._served = np.empty(len(self._turns), dtype=np.int64)
        for corpus, weight in enumerate(weights):
            self._served[self._turns == corpus] = np.arange(weight)

    @property
    def seq_length(self) -> int:
        """S, the same in all corpora."""
        return self.streams[0].seq_length

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples of one epoch of every corpus together; weights decide how far each is read by then."""
        return sum(stream.num_samples_per_epoch for stream in self.streams)

    def choose(self, number: int) -> tuple[int, int]:
        """Which corpus serves sample `number`, and with which of its own samples."""
        if number < 0:
            raise IndexError(f"sample {number} of a blend: samples are counted from 0")
        periods, place = divmod(number, len(self._turns))
        corpus = int(self._turns[place])
        return corpus, periods * self.weights[corpus] + int(self._served[place])

    def sample(self, number: int) -> Sample:
        """A sample of the corpus whose turn it is."""
        corpus, own_number = self.choose(number)
        return self.streams[corpus].sample(own_number)

    def locate(self, number: int, position: int) -> str:
        """Where token `position` of sample `number` comes from."""
        corpus, own_number = self.choose(number)
        return self.streams[corpus].locate(own_number, position)

    def describe(self) -> str:
        """One line: each corpus with its share."""
        period = len(self._turns)
        parts = (f"{weight / period:.4%} {stream.describe()}" for weight, stream in zip(self.weights, self.streams))
        return "; ".join(parts)


def _as_fraction(word: str) -> Fraction | None:
    """The number that `word` spells, exactly, or None if it is no finite number."""
    try:
        return Fraction(word)
    except (ValueError, ZeroDivisionError):
        return None
