"""The documents of a split as one long row of tokens: any stretch of it is found by one binary search.

A row keeps the cumulative lengths of its sequences, 8 bytes each, and nothing else; the tokens stay in the file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.indexed import IndexedDataset


@dataclass(frozen=True)
class DocumentPart:
    """Tokens `first` to `first + count - 1` of document number `document` of the file, which has `num_tokens`."""

    document: int
    first: int
    count: int
    num_tokens: int


class TokenRow:
    """All tokens of `documents` (numbers in a row) of one token file, in file order, counted from 0.

    starts: int64, where each sequence begins in the row, and at the end the length of the row. num_tokens: that length.
    """

    def __init__(self, dataset: IndexedDataset, documents: range) -> None:
        """Sum the lengths of the documents' sequences: O(sequences)."""
        self.dataset, self.documents = dataset, documents
        self.first_sequence = int(dataset.document_bounds[documents.start])
        last_sequence = int(dataset.document_bounds[documents.stop])
        lengths = dataset.lengths[self.first_sequence : last_sequence]
        self.starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, dtype=np.int64, out=self.starts[1:])
        self.num_tokens = int(self.starts[-1])
        self._first_byte = _first_byte(dataset.offsets[self.first_sequence : last_sequence], self.starts, dataset.dtype)

    @property
    def document_bounds(self) -> NDArray[np.int64]:
        """For each document the number within the row of its first sequence, and at the end the number of all."""
        return self.dataset.document_bounds[self.documents.start : self.documents.stop + 1] - self.first_sequence

    def read(self, first_token: int, count: int) -> NDArray[np.int64]:
        """`count` tokens from `first_token` on, across sequences, int64.

        Raises: IndexError if they are not all in the row; DataError if the file was cut short since it was opened.
        """
        if first_token < 0 or first_token + count > self.num_tokens:
            raise IndexError(
                f"tokens {first_token}..{first_token + count} of {self.num_tokens} in {self.dataset.prefix}"
            )
        if self._first_byte is not None:
            first_byte = self._first_byte + first_token * self.dataset.dtype.itemsize
            return self.dataset.read_at(first_byte, count).astype(np.int64)
        sequence = self._sequence_of(first_token)
        offset = first_token - int(self.starts[sequence])
        tokens = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            available = int(self.starts[sequence + 1] - self.starts[sequence]) - offset
            taken = min(available, count - filled)
            tokens[filled : filled + taken] = self.dataset.get(self.first_sequence + sequence, offset, taken)
            filled, sequence, offset = filled + taken, sequence + 1, 0
        return tokens

    def parts(self, first_token: int, count: int) -> list[DocumentPart]:
        """The parts of documents that `count` tokens from `first_token` on consist of, in order."""
        starts = self.starts[self.document_bounds]
        parts, token, end = [], first_token, first_token + count
        while token < end:
            place = int(np.searchsorted(starts, token, side="right")) - 1
            begin, stop = int(starts[place]), int(starts[place + 1])
            taken = min(end, stop) - token
            parts.append(DocumentPart(self.documents.start + place, token - begin, taken, stop - begin))
            token += taken
        return parts

    def locate(self, token: int) -> str:
        """File, document, sequence and offset of token `token` of the row."""
        sequence = self._sequence_of(token)
        offset = token - int(self.starts[sequence])
        sequence += self.first_sequence
        document = int(np.searchsorted(self.dataset.document_bounds, sequence, side="right")) - 1
        return f"{self.dataset.bin_path}, document {document}, sequence {sequence}, token {offset}"

    def _sequence_of(self, token: int) -> int:
        return int(np.searchsorted(self.starts, token, side="right")) - 1


def _first_byte(offsets: NDArray[np.int64], starts: NDArray[np.int64], dtype: np.dtype) -> int | None:
    """Where in .bin the row begins, if its sequences follow each other there, as writers leave them; else None."""
    if not len(offsets) or not np.array_equal(offsets, offsets[0] + starts[:-1] * dtype.itemsize):
        return None
    return int(offsets[0])
