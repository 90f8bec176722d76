"""The fixed samples of a training split as metrics see them: their tokens, and which of them are of one document."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.bert import BertSamples
from megatron3d.data.curriculum.metrics import MetricSample
from megatron3d.data.gpt import GPTSamples
from megatron3d.data.token_row import TokenRow
from megatron3d.data.tokenizer import Tokenizer
from megatron3d.errors import DataError

_TOKENS_PER_COUNT = 1 << 20


class SampleReader:
    """Makes a `MetricSample` of each fixed sample of a stream."""

    def __init__(self, stream: GPTSamples | BertSamples, tokenizer: Tokenizer | None) -> None:
        """Find where documents begin: O(documents)."""
        self.stream, self._tokenizer = stream, tokenizer
        self._row = TokenRow(stream.dataset, stream.documents)
        self._document_starts = self._row.starts[self._row.document_bounds]

    def read(self, number: int, log_probability: NDArray[np.float64] | None) -> MetricSample:
        """Fixed sample `number`. Raises: DataError if the file was cut short since it was opened."""
        decode = None if self._tokenizer is None else self._decoder(self._tokenizer)
        tokens, stretches = self._tokens_of(number)
        return MetricSample(number, tokens, stretches, log_probability, decode)

    def count_tokens(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each id occurs in the split, int64 [V]. Raises: DataError for an id outside the vocabulary."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for first in range(0, self._row.num_tokens, _TOKENS_PER_COUNT):
            ids = self._row.read(first, min(_TOKENS_PER_COUNT, self._row.num_tokens - first))
            outside = (ids < 0) | (ids >= vocab_size)
            if outside.any():
                place = int(np.argmax(outside))
                raise DataError(
                    f"{self._row.locate(first + place)}: token id {ids[place]} is outside the vocabulary of "
                    f"{vocab_size}; use the tokenizer and vocabulary the data was preprocessed with."
                )
            counts += np.bincount(ids, minlength=vocab_size)
        return counts

    def _tokens_of(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The S inputs of a GPT's sample, or both segments of a BERT's; and the stretches of one document."""
        if isinstance(self.stream, GPTSamples):
            size = self.stream.seq_length
            first = number * size
            inside = self._document_starts[
                np.searchsorted(self._document_starts, first, "right") : np.searchsorted(
                    self._document_starts, first + size, "left"
                )
            ]
            # Documents without tokens have the start of the next one.
            cuts = np.unique(np.concatenate([[first], inside, [first + size]]))
            return self._row.read(first, size), np.diff(cuts)
        segments = self.stream.segments(number)
        parts = [self._row.read(*_stretch(one)) for one in (segments.a, segments.b) if one is not None]
        tokens = np.concatenate(parts)
        return tokens, np.array([len(tokens)], dtype=np.int64)

    def _decoder(self, tokenizer: Tokenizer) -> Callable[[NDArray[np.int64]], str]:
        def decode(ids: NDArray[np.int64]) -> str:
            kept: Sequence[int] = (ids if tokenizer.eod is None else ids[ids != tokenizer.eod]).tolist()
            return tokenizer.decode(kept)

        return decode


def log_probabilities(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """log p of each id, float64 [V]; 0 for ids that do not occur, which no sample has."""
    shares = counts / max(1, int(counts.sum()))
    return np.log(shares, out=np.zeros(len(counts)), where=shares > 0)


def _stretch(bounds: tuple[int, int]) -> tuple[int, int]:
    """First token and length."""
    return bounds[0], bounds[1] - bounds[0]
