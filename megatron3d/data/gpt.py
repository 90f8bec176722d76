"""GPT samples of one corpus: sample k is S + 1 tokens in a row, found by arithmetic and one search.

The documents of a split are read as one long row of T tokens, in file order. An epoch cuts it into
n = (T - 1) // S samples of S inputs each (the label of an input is the token after it, so neighbours share one token)
and takes them in an order of its own. The T - 1 - n*S tokens that are left over are distributed at random between the
two ends, anew each epoch, so that samples begin elsewhere each time and no token is left out for good.

Nothing is built, stored or waited for: sample k belongs to epoch k // n, the epoch's permutation is computed, and a
binary search in the cumulative lengths finds the document. Unlike Megatron-LM, documents are not shuffled before they
are joined: that would need a table of documents per epoch. A corpus sorted by source still mixes, sample by sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron3d.data.batch import GPTBatch
from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.order import derive_seed, shuffled
from megatron3d.data.stream import SampleStream
from megatron3d.data.token_row import DocumentPart, TokenRow
from megatron3d.errors import DataError


class GPTSamples:
    """The samples of `documents` (numbers in a row) of one token file; a `SampleStream`.

    num_tokens: T, the tokens of the split. num_samples_per_epoch: n = (T - 1) // S.
    """

    def __init__(self, dataset: IndexedDataset, documents: range, *, seq_length: int, seed: int) -> None:
        """Sum the lengths of the documents: O(documents), the only work before the first sample.

        Raises: DataError if the documents hold fewer than seq_length + 1 tokens.
        """
        self.dataset, self.documents, self.seq_length, self.seed = dataset, documents, seq_length, seed
        self._row = TokenRow(dataset, documents)
        self.num_tokens = self._row.num_tokens
        self.num_samples_per_epoch = (self.num_tokens - 1) // seq_length
        self._left_over = self.num_tokens - 1 - self.num_samples_per_epoch * seq_length
        if self.num_tokens < seq_length + 1:
            raise DataError(
                f"{dataset.prefix}: documents {documents.start} to {documents.stop} hold {self.num_tokens} tokens, but "
                f"one sample of --seq-length {seq_length} needs {seq_length + 1}; lower --seq-length, give this split "
                f"more of the documents with --split, or add data."
            )

    def sample(self, number: int) -> NDArray[np.int64]:
        """The S + 1 tokens of sample `number`, int64. Raises: IndexError for a negative number."""
        return self._row.read(self._first_token(number), self.seq_length + 1)

    def locate(self, number: int, position: int) -> str:
        """File, document, sequence and offset of token `position` of sample `number`."""
        return self._row.locate(self._first_token(number) + position)

    def parts(self, number: int) -> list[DocumentPart]:
        """The parts of documents that sample `number` consists of, in order."""
        return self._row.parts(self._first_token(number), self.seq_length + 1)

    @property
    def num_fixed(self) -> int:
        """Fixed samples: as many as an epoch has."""
        return self.num_samples_per_epoch

    def fixed(self, index: int, draw: int) -> NDArray[np.int64]:
        """The S + 1 tokens from index*S on, as cut without an epoch's shift; nothing of them is drawn by `draw`."""
        return self._row.read(index * self.seq_length, self.seq_length + 1)

    def locate_fixed(self, index: int, position: int) -> str:
        """File, document, sequence and offset of token `position` of fixed sample `index`."""
        return self._row.locate(index * self.seq_length + position)

    def describe(self) -> str:
        """Documents, tokens and samples."""
        return (
            f"{self.dataset.prefix}: documents {self.documents.start} to {self.documents.stop}, {self.num_tokens:,} "
            f"tokens, {self.num_samples_per_epoch:,} samples of {self.seq_length} an epoch"
        )

    def _first_token(self, number: int) -> int:
        """Where in the row of T tokens sample `number` begins."""
        if number < 0:
            raise IndexError(f"sample {number} of {self.dataset.prefix}: samples are counted from 0")
        epoch, index = divmod(number, self.num_samples_per_epoch)
        shift = derive_seed(self.seed, "shift", epoch) % (self._left_over + 1)
        order = shuffled(self.num_samples_per_epoch, self.seed, "order", epoch)
        return shift + order[index] * self.seq_length


@dataclass(frozen=True)
class GPTReader:
    """Reads batches of a stream of token rows, and compares every id with the vocabulary.

    `vocab_size` bounds the ids; None does not check them.
    """

    stream: SampleStream[NDArray[np.int64]]
    rules: DocumentRules
    vocab_size: int | None

    def __call__(self, first: int, count: int) -> GPTBatch:
        """The samples first .. first + count - 1.

        Raises: DataError for a token id outside the vocabulary, with the file, document and offset.
        """
        samples_BS1 = np.empty((count, self.stream.seq_length + 1), dtype=np.int64)
        for row in range(count):
            samples_BS1[row] = self.stream.sample(first + row)
        if self.vocab_size is not None:
            self._check_ids(samples_BS1, first, self.vocab_size)
        return collate(samples_BS1, self.rules)

    def _check_ids(self, samples_BS1: NDArray[np.int64], first: int, vocab_size: int) -> None:
        """Raises: DataError for the first id that is negative or not below `vocab_size`."""
        # a negative id is a very large one when read without a sign, so one comparison sees both
        outside_BS1 = samples_BS1.view(np.uint64) >= vocab_size
        if outside_BS1.any():
            row, position = (int(place) for place in np.argwhere(outside_BS1)[0])
            raise DataError(
                f"{self.stream.locate(first + row, position)}: token id {samples_BS1[row, position]} is outside the "
                f"vocabulary of {vocab_size}; use the tokenizer and vocabulary the data was preprocessed with."
            )


@dataclass(frozen=True)
class DocumentRules:
    """What the end-of-document token means inside a sample; the flags are those of the command line.

    Labels that are `pad_token`, which fills samples up, have no loss.
    """

    eod_token: int | None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    pad_token: int | None = None


def collate(samples_BS1: NDArray[np.int64], rules: DocumentRules) -> GPTBatch:
    """Make a batch of B samples of S + 1 tokens each, int64 [B, S+1].

    An end-of-document token still belongs to the document it ends; the next one begins after it. `eod_mask_loss`
    takes out the loss at inputs that are this token (there the label is the first token of an unrelated text), which
    is Megatron-LM's meaning.
    """
    tokens_BS, labels_BS = samples_BS1[:, :-1], samples_BS1[:, 1:]
    loss_mask_BS = np.ones(tokens_BS.shape, dtype=np.float32)
    if rules.pad_token is not None:
        loss_mask_BS[labels_BS == rules.pad_token] = 0.0
    position_ids_BS = document_ids_BS = None
    if rules.eod_token is not None:
        ends_BS = tokens_BS == rules.eod_token
        if rules.eod_mask_loss:
            loss_mask_BS[ends_BS] = 0.0
        if rules.reset_attention_mask:
            document_ids_BS = torch.from_numpy(ends_BS.cumsum(axis=1, dtype=np.int64) - ends_BS)
        if rules.reset_position_ids:
            position_ids_BS = torch.from_numpy(_positions_in_document(ends_BS))
    return GPTBatch(
        torch.from_numpy(np.ascontiguousarray(tokens_BS)),
        torch.from_numpy(np.ascontiguousarray(labels_BS)),
        torch.from_numpy(loss_mask_BS),
        position_ids_BS=position_ids_BS,
        document_ids_BS=document_ids_BS,
    )


def _positions_in_document(ends_BS: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Distance of each token from the first token of its document within the sample, int64 [B, S]."""
    index_S = np.arange(ends_BS.shape[1], dtype=np.int64)
    starts_BS = np.zeros(ends_BS.shape, dtype=np.int64)
    starts_BS[:, 1:] = np.where(ends_BS[:, :-1], index_S[1:], 0)
    return index_S - np.maximum.accumulate(starts_BS, axis=1)
