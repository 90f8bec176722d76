"""A token file read from end to end: is every id one of the vocabulary, and does every document end as it should?

Opening a file compares the index with the lengths of both files; what the tokens are, only reading them shows. The
reading is one pass in the order of the file, in blocks, so memory is that of the index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.indexed import IndexedDataset

_BLOCK_IDS = 1 << 22


@dataclass(frozen=True)
class Verification:
    """What the whole file holds.

    `smallest_id` and `largest_id` are None without a token. `outside` counts the ids outside the vocabulary, None if
    it is not known; `first_outside` says where the first of them is. `eod_ended` counts the documents with tokens
    whose last one is the end-of-document token, `eod_inside` those tokens elsewhere; both None if it is not known.
    `problems` are sentences, and none where the file is good.
    """

    documents: int
    empty_documents: int
    empty_sequences: int
    tokens: int
    smallest_id: int | None
    largest_id: int | None
    outside: int | None
    first_outside: str | None
    eod_ended: int | None
    eod_inside: int | None
    problems: tuple[str, ...]


def verify_dataset(
    dataset: IndexedDataset,
    *,
    vocab_size: int | None = None,
    eod_token: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Read all tokens; `report` takes the bytes read and those of the whole file after each block.

    Without a `vocab_size` only negative ids are outside. Documents that end with `eod_token` beside others that do not
    are a problem: they were made by different runs, or something was cut off. None that does is how `preprocess_data`
    without --append-eod leaves them.

    Raises: DataError if the file was cut short since it was opened.
    """
    scan = _Scan(dataset, vocab_size, eod_token)
    total = dataset.num_tokens
    for first in range(0, total, _BLOCK_IDS):
        count = min(_BLOCK_IDS, total - first)
        scan.add(first, dataset.read_at(first * dataset.dtype.itemsize, count))
        report((first + count) * dataset.dtype.itemsize, total * dataset.dtype.itemsize)
    return scan.result()


class _Scan:
    """Counts over the blocks of a file; token numbers are places in .bin."""

    def __init__(self, dataset: IndexedDataset, vocab_size: int | None, eod_token: int | None) -> None:
        self._dataset, self._vocab_size, self._eod_token = dataset, vocab_size, eod_token
        lasts = _last_tokens(dataset)
        self._num_documents_with_tokens = len(lasts)
        self._lasts = np.sort(lasts)
        self._lows: list[int] = []
        self._highs: list[int] = []
        self._outside = 0
        self._first_outside: tuple[int, int] | None = None  # the token's number, and its id
        self._eods, self._eod_ended = 0, 0
        self._first_without: int | None = None

    def add(self, first: int, ids: NDArray[Any]) -> None:
        """Count a block that begins with token `first`."""
        low, high = int(ids.min()), int(ids.max())
        self._lows.append(low)
        self._highs.append(high)
        bound = self._vocab_size
        if low < 0 or (bound is not None and high >= bound):
            outside = (ids < 0) if bound is None else (ids < 0) | (ids >= bound)
            if self._first_outside is None:
                place = int(np.argmax(outside))
                self._first_outside = (first + place, int(ids[place]))
            self._outside += int(outside.sum())
        if self._eod_token is not None:
            self._add_ends(first, ids == self._eod_token)

    def _add_ends(self, first: int, is_eod: NDArray[np.bool_]) -> None:
        begin, end = np.searchsorted(self._lasts, [first, first + len(is_eod)])
        lasts = self._lasts[begin:end]
        ended = is_eod[lasts - first]
        self._eods += int(is_eod.sum())
        self._eod_ended += int(ended.sum())
        if self._first_without is None and not ended.all():
            self._first_without = int(lasts[np.argmin(ended)])

    def result(self) -> Verification:
        """The counts, and what is wrong."""
        dataset = self._dataset
        tokens_per_document = document_lengths(dataset)
        knows_eod = self._eod_token is not None
        return Verification(
            documents=dataset.num_documents,
            empty_documents=int((tokens_per_document == 0).sum()),
            empty_sequences=int((dataset.lengths == 0).sum()),
            tokens=dataset.num_tokens,
            smallest_id=min(self._lows, default=None),
            largest_id=max(self._highs, default=None),
            outside=self._outside if self._vocab_size is not None else None,
            first_outside=None if self._first_outside is None else _place(dataset, self._first_outside[0]),
            eod_ended=self._eod_ended if knows_eod else None,
            eod_inside=self._eods - self._eod_ended if knows_eod else None,
            problems=tuple(self._problems()),
        )

    def _problems(self) -> list[str]:
        problems = []
        if self._first_outside is not None:
            number, token = self._first_outside
            size = "" if self._vocab_size is None else f" of {self._vocab_size:,}"
            problems.append(
                f"{_place(self._dataset, number)}: token id {token} is outside the vocabulary{size}, as are "
                f"{self._outside:,} of {self._dataset.num_tokens:,} ids in all; this is another tokenizer's data, or "
                f"the file is damaged."
            )
        if self._first_without is not None and self._eod_ended:
            without = self._num_documents_with_tokens - self._eod_ended
            problems.append(
                f"{_place(self._dataset, self._first_without)}: the document does not end with the end-of-document "
                f"token {self._eod_token}, nor do {without:,} of {self._num_documents_with_tokens:,} documents in all, "
                f"while the others do; preprocess all of the corpus with --append-eod, or none."
            )
        return problems


def document_lengths(dataset: IndexedDataset) -> NDArray[np.int64]:
    """The tokens of each document, int64 [documents]."""
    sums = np.concatenate([[0], np.cumsum(dataset.lengths, dtype=np.int64)])
    return np.diff(sums[dataset.document_bounds])


def _last_tokens(dataset: IndexedDataset) -> NDArray[np.int64]:
    """Where in .bin, counted in tokens, the last one of each document is that has any."""
    sequences = np.where(dataset.lengths > 0, np.arange(len(dataset)), -1)
    last_with_tokens = np.concatenate([[-1], np.maximum.accumulate(sequences)])[dataset.document_bounds[1:]]
    chosen = last_with_tokens[last_with_tokens >= dataset.document_bounds[:-1]]
    return dataset.offsets[chosen] // dataset.dtype.itemsize + dataset.lengths[chosen] - 1


def _place(dataset: IndexedDataset, token: int) -> str:
    """File, document, sequence and offset of a token by its number in .bin."""
    starts = dataset.offsets // dataset.dtype.itemsize
    inside = (starts <= token) & (token < starts + dataset.lengths)
    sequence = int(np.argmax(inside))
    document = int(np.searchsorted(dataset.document_bounds, sequence, side="right")) - 1
    return f"{dataset.bin_path}, document {document}, sequence {sequence}, token {token - int(starts[sequence])}"
