"""Packing: every sentence once an epoch, within documents and capacity; the share and the lengths of short samples."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.data.packing import EpochPlan, SentenceSpans, cut_pieces, pack
from tests.data.chances import is_plausible

documents_of_sentences = st.lists(st.lists(st.integers(0, 25), max_size=12), min_size=1, max_size=8)


def row_of(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sentence starts and document bounds of documents given by the lengths of their sentences."""
    lengths = [length for document in documents for length in document]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return starts, np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)


def equal_pieces(num_documents: int, sentences: int, tokens: int) -> SentenceSpans:
    return SentenceSpans(*row_of([[tokens] * sentences] * num_documents))


@settings(max_examples=200, deadline=None)
@given(documents=documents_of_sentences, max_tokens=st.integers(1, 12), needs_two=st.booleans())
def test_pieces_keep_every_token_in_its_document_and_are_short_enough(
    documents: list[list[int]], max_tokens: int, needs_two: bool
) -> None:
    starts, bounds = row_of(documents)
    pieces = cut_pieces(starts, bounds, max_tokens=max_tokens, needs_two=needs_two)
    sizes = np.diff(pieces.starts)
    assert pieces.starts[0] == 0 and pieces.starts[-1] == starts[-1]
    assert ((sizes >= 1) & (sizes <= max_tokens)).all()
    assert set(starts.tolist()) <= set(pieces.starts.tolist()), "a piece spans two sentences"
    for number, document in enumerate(documents):
        first, last = pieces.document_bounds[number : number + 2]
        assert pieces.starts[last] - pieces.starts[first] == sum(document)
        if needs_two and sum(document) >= 2 and len([length for length in document if length]) == 1:
            assert last - first >= 2
        expected = sum(-(-length // max_tokens) for length in document)
        assert last - first == (2 if needs_two and expected == 1 and sum(document) >= 2 else expected)


@settings(max_examples=200, deadline=None)
@given(documents=documents_of_sentences, capacity=st.integers(2, 40), min_pieces=st.sampled_from([1, 2]))
def test_blocks_hold_every_piece_once_and_no_more_than_fits(
    documents: list[list[int]], capacity: int, min_pieces: int
) -> None:
    pieces = cut_pieces(*row_of(documents), max_tokens=capacity // min_pieces, needs_two=min_pieces == 2)
    blocks = pack(pieces, capacity=capacity, min_pieces=min_pieces)
    covered = [piece for first, stop in zip(blocks.firsts, blocks.stops) for piece in range(first, stop)]
    bounds = pieces.document_bounds
    wanted = [piece for first, last in pairwise(bounds) if last - first >= min_pieces for piece in range(first, last)]
    assert covered == wanted
    for first, stop, document in zip(blocks.firsts, blocks.stops, blocks.documents):
        assert bounds[document] <= first < stop <= bounds[document + 1] and stop - first >= min_pieces
        size = pieces.starts[stop] - pieces.starts[first]
        assert size <= capacity or (min_pieces == 2 and stop - first == 3 and stop == bounds[document + 1])
        if stop < bounds[document + 1]:  # full: the next piece would not have fitted, or was left for the last one
            two_more = pieces.starts[min(stop + 2, bounds[document + 1])] - pieces.starts[first]
            assert two_more > capacity


@settings(max_examples=60, deadline=None)
@given(
    documents=documents_of_sentences.filter(lambda ds: any(len([s for s in d if s]) > 1 for d in ds)),
    min_pieces=st.sampled_from([1, 2]),
    short_share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_every_epoch_shows_every_piece_once(
    documents: list[list[int]], min_pieces: int, short_share: float, seed: int
) -> None:
    pieces = cut_pieces(*row_of(documents), max_tokens=30 // min_pieces, needs_two=min_pieces == 2)
    blocks = pack(pieces, capacity=30, min_pieces=min_pieces)
    plan = EpochPlan(pieces, blocks, min_pieces=min_pieces, short_share=short_share, seed=seed)
    whole = sorted(p for first, stop in zip(blocks.firsts, blocks.stops) for p in range(first, stop))
    for epoch in range(3):
        shown = [plan.pieces_of(epoch, index) for index in range(plan.num_samples)]
        assert sorted(piece for first, stop, _ in shown for piece in range(first, stop)) == whole
        for first, stop, document in shown:
            assert stop - first >= min_pieces
            assert pieces.document_bounds[document] <= first < stop <= pieces.document_bounds[document + 1]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_share_of_samples_that_are_short_is_the_probability(share: float) -> None:
    """Each document fills one block, so a sample that does not show all of its document is a short one."""
    pieces = equal_pieces(2000, 20, 5)
    plan = EpochPlan(pieces, pack(pieces, capacity=100, min_pieces=2), min_pieces=2, short_share=share, seed=1)
    for epoch in range(2):
        sizes = [np.subtract(*plan.pieces_of(epoch, index)[1::-1]) for index in range(plan.num_samples)]
        assert sum(size < 20 for size in sizes) / len(sizes) == pytest.approx(share, abs=0.001)


def test_short_lengths_are_spread_evenly_and_change_with_the_epoch() -> None:
    pieces = equal_pieces(2000, 100, 1)
    plan = EpochPlan(pieces, pack(pieces, capacity=100, min_pieces=2), min_pieces=2, short_share=1.0, seed=1)
    cuts = [
        {plan.pieces_of(epoch, index)[1] for index in range(plan.num_samples)} - set(range(0, 200_001, 100))
        for epoch in range(2)
    ]
    sizes = np.array(sorted(cuts[0])) % 100
    assert len(sizes) == 2000
    for quarter in range(4):
        assert is_plausible(int(((sizes >= 25 * quarter) & (sizes < 25 * (quarter + 1))).sum()), 2000, 0.25)
    assert len(cuts[0] & cuts[1]) < 60  # a cut comes again with a chance of 1 in 97: about 21 of 2,000


def test_order_and_choice_of_short_blocks_change_with_the_epoch() -> None:
    pieces = equal_pieces(300, 10, 5)
    plan = EpochPlan(pieces, pack(pieces, capacity=50, min_pieces=2), min_pieces=2, short_share=0.3, seed=1)
    first, second = ([plan.pieces_of(epoch, index) for index in range(plan.num_samples)] for epoch in (0, 1))
    assert first != second and {s[2] for s in first if s[1] - s[0] < 10} != {s[2] for s in second if s[1] - s[0] < 10}


def test_order_of_blocks_too_small_to_be_cut_changes_with_the_epoch() -> None:
    pieces = equal_pieces(300, 3, 5)
    plan = EpochPlan(pieces, pack(pieces, capacity=50, min_pieces=2), min_pieces=2, short_share=0.3, seed=1)
    first, second = ([plan.pieces_of(epoch, index)[2] for index in range(300)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(300))
    assert sum(one == two for one, two in zip(first, second)) < 10
