"""Sentences packed into blocks of at most so many tokens, and the blocks of an epoch that are cut short.

The sentences of a document are taken in order; a block is as many of them in a row as fit. Which block a sample shows
is arithmetic: every epoch has the same number of samples, n = N + k for N blocks of which k are cut in two, and each
sentence is in exactly one sample of an epoch. Which blocks are cut, where, and the order are drawn anew each epoch.

This is computed by every process for itself from the lengths in the index, a vectorised pass over all documents at
once; nothing is stored and nobody waits. Megatron-LM, in contrast, draws the short lengths while it packs, so that
the number of samples of an epoch is known only after a walk through all epochs, which rank 0 does and stores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron3d.data.order import derive_seed, shuffled


@dataclass(frozen=True)
class SentenceSpans:
    """Sentences, or parts of those that are too long, as stretches of a token row.

    starts: int64 [P + 1], where each piece begins in the row, and where the last one stops (a piece stops where the
    next begins). document_bounds: int64 [D + 1]; document d has the pieces document_bounds[d] .. [d + 1] - 1.
    """

    starts: NDArray[np.int64]
    document_bounds: NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Block b is the pieces firsts[b] .. stops[b] - 1 of document documents[b]; all int64 [N], in file order."""

    firsts: NDArray[np.int64]
    stops: NDArray[np.int64]
    documents: NDArray[np.int64]

    def __len__(self) -> int:
        """N, the number of blocks."""
        return len(self.firsts)


def cut_pieces(
    sentence_starts: NDArray[np.int64], document_bounds: NDArray[np.int64], *, max_tokens: int, needs_two: bool
) -> SentenceSpans:
    """Cut sentences of more than `max_tokens` tokens into pieces of equal size; empty sentences disappear.

    With `needs_two`, the sentence of a document that has no other is cut in two if it has two tokens.
    """
    lengths = np.diff(sentence_starts)
    counts = -(-lengths // max_tokens)
    if needs_two:
        bounds = _bounds(counts, document_bounds)
        lonely = bounds[:-1][np.diff(bounds) == 1]
        sentences = np.searchsorted(np.cumsum(counts), lonely, side="right")
        counts[sentences[lengths[sentences] >= 2]] = 2
    if (counts == 1).all():
        return SentenceSpans(sentence_starts, document_bounds)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(sentence_starts[:-1], counts) + np.repeat(lengths, counts) * place // np.repeat(counts, counts)
    return SentenceSpans(np.append(starts, sentence_starts[-1]), _bounds(counts, document_bounds))


def pack(pieces: SentenceSpans, *, capacity: int, min_pieces: int) -> Blocks:
    """Fill blocks of up to `capacity` tokens, from the first piece of each document on.

    With `min_pieces` 2 no block has a single piece, provided that no piece has over capacity/2 tokens: where one
    would be left over at the end of a document, the block before gives it company, or, if it has only two itself,
    takes it in and is then over `capacity`. Documents with fewer pieces give no block.
    """
    bounds = pieces.document_bounds
    documents = np.flatnonzero(np.diff(bounds) >= min_pieces)
    first, last = bounds[documents], bounds[documents + 1]
    found: list[tuple[NDArray, NDArray, NDArray]] = []
    while len(first):  # one block of every document that goes on
        reach = np.searchsorted(pieces.starts, pieces.starts[first] + capacity, side="right") - 1
        stop = np.minimum(reach, last)
        if min_pieces == 2:
            stop += np.where(last - stop == 1, np.where(stop - first >= 3, -1, 1), 0)
        found.append((first, stop, documents))
        goes_on = stop < last
        first, last, documents = stop[goes_on], last[goes_on], documents[goes_on]
    if not found:
        return Blocks(*(np.empty(0, dtype=np.int64) for _ in range(3)))
    firsts, stops, owners = (np.concatenate(parts) for parts in zip(*found))
    in_file_order = np.argsort(firsts, kind="stable")
    return Blocks(firsts[in_file_order], stops[in_file_order], owners[in_file_order])


class EpochPlan:
    """Which pieces the samples of an epoch show: whole blocks, and parts of blocks that are cut in two.

    Of n = N + k samples, 2k are parts: k = p*N / (2 - p) makes their share p, as far as enough blocks can be cut. A
    block is cut at a piece near a place drawn evenly over its tokens, and both parts keep `min_pieces` pieces, so the
    lengths of parts are about even from 2 to the whole, as those of the short sequences of BERT are.
    """

    def __init__(
        self, pieces: SentenceSpans, blocks: Blocks, *, min_pieces: int, short_share: float, seed: int
    ) -> None:
        """Decide how many blocks are cut. `short_share` is p, 0 to 1."""
        self._pieces, self._blocks, self._min_pieces, self._seed = pieces, blocks, min_pieces, seed
        can_be_cut = blocks.stops - blocks.firsts >= 2 * min_pieces
        self._cuttable, self._uncut = np.flatnonzero(can_be_cut), np.flatnonzero(~can_be_cut)
        wanted = round(short_share * len(blocks) / (2 - short_share))
        self.num_cut = min(wanted, len(self._cuttable))

    @property
    def num_samples(self) -> int:
        """n = N + k, in every epoch."""
        return len(self._blocks) + self.num_cut

    def pieces_of(self, epoch: int, index: int) -> tuple[int, int, int]:
        """The first piece, the piece after the last, and the document of sample `index` (0 to n - 1) of `epoch`."""
        place = shuffled(self.num_samples, self._seed, "order", epoch)[index]
        if place >= len(self._cuttable) + self.num_cut:
            block = int(self._uncut[place - len(self._cuttable) - self.num_cut])
        else:
            # the blocks that can be cut in a random order: the first k of them are cut, with two places each
            turn = place // 2 if place < 2 * self.num_cut else place - self.num_cut
            block = int(self._cuttable[shuffled(len(self._cuttable), self._seed, "cut", epoch)[turn]])
        first, stop = int(self._blocks.firsts[block]), int(self._blocks.stops[block])
        document = int(self._blocks.documents[block])
        if place >= 2 * self.num_cut:
            return first, stop, document
        middle = self._cut(epoch, block, first, stop)
        return (first, middle, document) if place % 2 == 0 else (middle, stop, document)

    def _cut(self, epoch: int, block: int, first: int, stop: int) -> int:
        """The piece at which a block is cut in an epoch."""
        starts = self._pieces.starts
        num_tokens = int(starts[stop] - starts[first])
        token = int(starts[first]) + derive_seed(self._seed, "cut", epoch, block) % num_tokens
        middle = int(np.searchsorted(starts, token, side="right"))
        return min(max(middle, first + self._min_pieces), stop - self._min_pieces)


def _bounds(counts: NDArray[np.int64], sentence_bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Document bounds in pieces, where sentence s has counts[s] of them."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[sentence_bounds]
