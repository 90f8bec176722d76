"""BERT samples of one corpus of sentences: [CLS] A [SEP] B [SEP], some tokens masked, and whether B follows A.

    packing.py   which sentences sample k of an epoch shows: up to S - 3 tokens in a row of one document
    here         where A ends and B begins; what stands in B's place; how a sample is put together
    masking.py   which tokens are predicted

Sentence tasks: `order` (sentence-order prediction, Megatron-LM's) swaps A and B in half of the samples; `next`
(next-sentence prediction, BERT's own) gives half of the samples the B of another document; None has no B.
Nothing is read before it is known which tokens of the file a sample needs, and that is arithmetic on its number.

Sources: J. Devlin et al., BERT (2018), section 3.1 and appendix A.2; Z. Lan et al., ALBERT (2019), section 3.1 (order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron3d.data.batch import BertBatch
from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.masking import BertVocabulary, MaskingRules, mask_tokens
from megatron3d.data.order import derive_seed
from megatron3d.data.packing import EpochPlan, cut_pieces, pack
from megatron3d.data.stream import SampleStream
from megatron3d.data.token_row import TokenRow
from megatron3d.errors import DataError

_NUM_SPECIAL = 3
MIN_SEQ_LENGTH = _NUM_SPECIAL + 2


@dataclass(frozen=True)
class BertForm:
    """What a sample looks like, whatever it is made of. S is `seq_length`, special tokens and padding included."""

    seq_length: int
    vocabulary: BertVocabulary
    masking: MaskingRules
    short_seq_prob: float = 0.1
    sentence_task: str | None = "order"

    @property
    def capacity(self) -> int:
        """S - 3, the tokens of text a sample has room for."""
        return self.seq_length - _NUM_SPECIAL


@dataclass(frozen=True)
class BertSample:
    """One sample, padded: int64 [S] tokens, labels and token_types, bool [S] predicted; T of the S tokens are real.

    sentence_label: 0 where B follows A, 1 where it does not, None where there is no sentence task.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    predicted: NDArray[np.bool_]
    token_types: NDArray[np.int64]
    num_tokens: int
    sentence_label: int | None


@dataclass(frozen=True)
class Segments:
    """The stretches of a token row (first, stop) that are A and B, and the sentence label; None: no B, no label."""

    a: tuple[int, int]
    b: tuple[int, int] | None
    label: int | None


class BertSamples:
    """The samples of `documents` (numbers in a row) of one token file of sentences; a `SampleStream`."""

    def __init__(self, dataset: IndexedDataset, documents: range, *, form: BertForm, seed: int) -> None:
        """Pack the sentences: O(sentences), vectorised, the only work before the first sample.

        Raises: DataError if the documents hold no sample, or too few of them for next-sentence prediction.
        """
        self.dataset, self.documents, self.form, self.seed = dataset, documents, form, seed
        self._row = TokenRow(dataset, documents)
        self._min_pieces = 1 if form.sentence_task is None else 2
        self._pieces = cut_pieces(
            self._row.starts,
            self._row.document_bounds,
            max_tokens=form.capacity // self._min_pieces,
            needs_two=form.sentence_task is not None,
        )
        blocks = pack(self._pieces, capacity=form.capacity, min_pieces=self._min_pieces)
        shares = np.unique(blocks.documents, return_counts=True)[1] / max(1, len(blocks))
        self._check_enough(len(blocks), len(shares))
        self._plan = EpochPlan(
            self._pieces, blocks, min_pieces=self._min_pieces, short_share=form.short_seq_prob, seed=seed
        )
        # two samples of the same document exchange nothing, which the others make up for
        self._exchange_share = min(1.0, 0.5 / (1.0 - float(shares @ shares))) if form.sentence_task == "next" else 0.0

    @property
    def seq_length(self) -> int:
        """S."""
        return self.form.seq_length

    @property
    def num_tokens(self) -> int:
        """The tokens of the split."""
        return self._row.num_tokens

    @property
    def num_samples_per_epoch(self) -> int:
        """Blocks of sentences, and one more for each that is cut in two."""
        return self._plan.num_samples

    def segments(self, number: int) -> Segments:
        """Which tokens of the row are A and B of sample `number`. Raises: IndexError for a negative number."""
        if number < 0:
            raise IndexError(f"sample {number} of {self.dataset.prefix}: samples are counted from 0")
        epoch, index = divmod(number, self.num_samples_per_epoch)
        generator = np.random.default_rng(derive_seed(self.seed, "segments", number))
        if self.form.sentence_task is None:
            first, stop, _ = self._plan.pieces_of(epoch, index)
            return Segments(self._tokens_of(first, stop), None, None)
        if self.form.sentence_task == "order":
            first, stop, _ = self._plan.pieces_of(epoch, index)
            middle = first + 1 + int(generator.random() * (stop - first - 1))
            a, b, label = self._tokens_of(first, middle), self._tokens_of(middle, stop), int(generator.random() < 0.5)
            a, b = trim(*((b, a) if label else (a, b)), self.form.capacity, generator)
            return Segments(a, b, label)
        (a, b), label = self._next_sentences(epoch, index)
        a, b = trim(a, b, self.form.capacity, generator)
        return Segments(a, b, label)

    def sample(self, number: int) -> BertSample:
        """Sample `number`. Raises: IndexError for a negative number; DataError for an id outside the vocabulary."""
        return self.fixed(number, number)

    @property
    def num_fixed(self) -> int:
        """Fixed samples: those of the first epoch."""
        return self.num_samples_per_epoch

    def fixed(self, index: int, draw: int) -> BertSample:
        """The sentences of sample `index` with masks drawn by `draw`, so that they are new each time it is shown.

        Raises: as `sample`.
        """
        segments = self.segments(index)
        a = self._row.read(segments.a[0], segments.a[1] - segments.a[0])
        b = None if segments.b is None else self._row.read(segments.b[0], segments.b[1] - segments.b[0])
        for stretch, ids in ((segments.a, a), (segments.b, b)):
            self._check_ids(stretch, ids)
        generator = np.random.default_rng(derive_seed(self.seed, "masking", draw))
        return make_sample(a, b, segments.label, self.form, generator)

    def locate_fixed(self, index: int, position: int) -> str:
        """The same as `locate`: a fixed sample has the number of its place in the first epoch."""
        return self.locate(index, position)

    def locate(self, number: int, position: int) -> str:
        """File, document, sequence and offset of token `position` of sample `number`."""
        segments = self.segments(number)
        in_a, in_b = position - 1, position - 2 - (segments.a[1] - segments.a[0])
        if 0 <= in_a < segments.a[1] - segments.a[0]:
            return self._row.locate(segments.a[0] + in_a)
        if segments.b is not None and 0 <= in_b < segments.b[1] - segments.b[0]:
            return self._row.locate(segments.b[0] + in_b)
        return f"{self.dataset.bin_path}, sample {number}, position {position}, a special token or padding"

    def describe(self) -> str:
        """Documents, sentences, tokens and samples."""
        return (
            f"{self.dataset.prefix}: documents {self.documents.start} to {self.documents.stop}, "
            f"{len(self._row.starts) - 1:,} sentences, {self.num_tokens:,} tokens, {self.num_samples_per_epoch:,} "
            f"samples of {self.seq_length} an epoch"
        )

    def _next_sentences(self, epoch: int, index: int) -> tuple[tuple[tuple[int, int], tuple[int, int]], int]:
        """A and B of next-sentence prediction, and the label.

        Samples half an epoch apart are partners. Both are cut at about the same share of their tokens, and in half of
        the pairs they exchange their B; so each sentence is still in one sample of the epoch. The epoch's order is
        random, so the partner is a random one. Partners of the same document exchange nothing.
        """
        half = self.num_samples_per_epoch // 2
        pair = index % half if half and index < 2 * half else index
        generator = np.random.default_rng(derive_seed(self.seed, "pair", epoch, pair))
        wants_exchange, share = generator.random() < self._exchange_share, generator.random()
        (a, b), document = self._cut_at_share(epoch, index, share)
        if not wants_exchange or pair == index >= half:
            return (a, b), 0
        partner = index + half if index < half else index - half
        (_, other_b), other_document = self._cut_at_share(epoch, partner, share)
        return ((a, b), 0) if other_document == document else ((a, other_b), 1)

    def _cut_at_share(
        self, epoch: int, index: int, share: float
    ) -> tuple[tuple[tuple[int, int], tuple[int, int]], int]:
        """A sample's two segments, cut at the piece nearest to a share of its tokens, and its document."""
        first, stop, document = self._plan.pieces_of(epoch, index)
        inner = self._pieces.starts[first + 1 : stop]
        begin, end = self._tokens_of(first, stop)
        middle = int(inner[np.argmin(np.abs(inner - (begin + share * (end - begin))))])
        return ((begin, middle), (middle, end)), document

    def _tokens_of(self, first: int, stop: int) -> tuple[int, int]:
        """The tokens of pieces first .. stop - 1, as (first, stop)."""
        return int(self._pieces.starts[first]), int(self._pieces.starts[stop])

    def _check_enough(self, num_blocks: int, num_documents: int) -> None:
        """Raises: DataError if no sample can be made."""
        where = f"{self.dataset.prefix}: documents {self.documents.start} to {self.documents.stop}"
        if num_blocks == 0:
            raise DataError(
                f"{where} hold {self.num_tokens} tokens in {len(self._row.starts) - 1} sentences, and no document has "
                f"the {self._min_pieces} tokens that a sample needs; give this split more of the documents with "
                f"--split, or add data."
            )
        if self.form.sentence_task == "next" and num_documents < 2:
            raise DataError(
                f"{where} are one document with text, but --bert-sentence-task next takes every other B from another; "
                f"use --bert-sentence-task order, give this split more of the documents with --split, or add data."
            )

    def _check_ids(self, stretch: tuple[int, int] | None, ids: NDArray[np.int64] | None) -> None:
        """Raises: DataError for the first id of a stretch of the row that is outside the vocabulary."""
        if stretch is None or ids is None:
            return
        outside = (ids < 0) | (ids >= self.form.vocabulary.size)
        if outside.any():
            offset = int(np.argmax(outside))
            raise DataError(
                f"{self._row.locate(stretch[0] + offset)}: token id {ids[offset]} is outside the vocabulary of "
                f"{self.form.vocabulary.size}; use the tokenizer and vocabulary the data was preprocessed with."
            )


def trim(
    a: tuple[int, int], b: tuple[int, int], capacity: int, generator: np.random.Generator
) -> tuple[tuple[int, int], tuple[int, int]]:
    """A and B cut to `capacity` tokens together: the longer one gives first, each token from either end by chance."""
    length_a, length_b = a[1] - a[0], b[1] - b[0]
    excess = length_a + length_b - capacity
    if excess <= 0:
        return a, b
    lead = min(excess, abs(length_a - length_b))
    from_a = (lead if length_a > length_b else 0) + (excess - lead) // 2
    return _drop(a, from_a, generator), _drop(b, excess - from_a, generator)


def make_sample(
    a: NDArray[np.int64],
    b: NDArray[np.int64] | None,
    label: int | None,
    form: BertForm,
    generator: np.random.Generator,
) -> BertSample:
    """Put a sample of S tokens together from the ids of A and B, mask it and pad it."""
    vocabulary = form.vocabulary
    parts = [[vocabulary.cls], a, [vocabulary.sep]]
    parts += [] if b is None else [b, [vocabulary.sep]]
    tokens = np.concatenate(parts).astype(np.int64)
    is_text = np.ones(len(tokens), dtype=bool)
    is_text[[0, len(a) + 1, -1]] = False
    masked = mask_tokens(tokens, is_text, vocabulary, form.masking, generator)
    padding = (0, form.seq_length - len(tokens))
    token_types = np.zeros(form.seq_length, dtype=np.int64)
    token_types[len(a) + 2 : len(tokens)] = 1
    return BertSample(
        np.pad(masked.tokens, padding, constant_values=vocabulary.pad),
        np.pad(masked.labels, padding, constant_values=vocabulary.pad),
        np.pad(masked.predicted, padding),
        token_types,
        len(tokens),
        label,
    )


@dataclass(frozen=True)
class BertReader:
    """Reads batches of a stream of BERT samples, for `GlobalBatches`."""

    stream: SampleStream[BertSample]

    def __call__(self, first: int, count: int) -> BertBatch:
        """The samples first .. first + count - 1. Raises: DataError for a token id outside the vocabulary."""
        return collate_bert([self.stream.sample(first + row) for row in range(count)])


def collate_bert(samples: Sequence[BertSample]) -> BertBatch:
    """Stack samples of one form."""

    def stack(rows: list[NDArray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(rows))

    lengths = torch.tensor([sample.num_tokens for sample in samples])
    labels = [sample.sentence_label for sample in samples]
    return BertBatch(
        stack([sample.tokens for sample in samples]),
        stack([sample.labels for sample in samples]),
        stack([sample.predicted for sample in samples]).float(),
        stack([sample.token_types for sample in samples]),
        torch.arange(len(samples[0].tokens)) < lengths[:, None],
        None if labels[0] is None else torch.tensor(labels, dtype=torch.int64),
    )


def _drop(stretch: tuple[int, int], count: int, generator: np.random.Generator) -> tuple[int, int]:
    """A stretch with `count` tokens fewer, each taken from its front or its back."""
    from_front = int((generator.random(count) < 0.5).sum())
    return stretch[0] + from_front, stretch[1] - (count - from_front)
