"""How a sample is cut over context-parallel ranks: who has which positions, and how evenly attention is spread."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron3d.config.sections.parallel import CONTEXT_CUTS
from megatron3d.errors import ConfigError
from megatron3d.nn.context.cut import ContextCut, attention_area, places_of, positions_of

LENGTHS = (32, 48, 8 * 37, 4096)  # the third has chunks of a prime length


def _documents(length: int, seed: int) -> np.ndarray:
    """The documents of a random mix: from many short ones to few long ones."""
    draw = np.random.default_rng(seed)
    mean = float(draw.choice([length / 64, length / 8, length / 2]))
    lengths = np.maximum(1, draw.lognormal(np.log(mean), 1.0, size=length).astype(np.int64))
    return np.repeat(np.arange(length), lengths)[:length]


@pytest.mark.parametrize("kind", CONTEXT_CUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_rank_has_equally_many_positions_and_no_position_is_lost(kind: str, num_ranks: int) -> None:
    for length in LENGTHS:
        for seed in range(4):
            documents_S = _documents(length, seed)
            runs = ContextCut(kind, length, num_ranks).runs(documents_S)
            positions = [positions_of(of_rank) for of_rank in runs]
            assert [len(one) for one in positions] == [length // num_ranks] * num_ranks
            assert all((np.diff(one) > 0).all() for one in positions), "positions of a rank ascend"
            gathered = np.concatenate(positions)
            assert sorted(gathered.tolist()) == list(range(length))
            assert (gathered[places_of(runs)] == np.arange(length)).all(), "the way back to the order of the sample"


@pytest.mark.parametrize("kind", CONTEXT_CUTS)
def test_a_run_is_all_of_a_document_that_is_together_on_a_rank(kind: str) -> None:
    for seed in range(6):
        documents_S = _documents(296, seed)
        for of_rank in ContextCut(kind, 296, 4).runs(documents_S):
            assert [row for run in of_rank for row in run.rows] == list(range(74))
            for run in of_rank:
                assert len({int(documents_S[position]) for position in run.positions}) == 1
            for one, following in itertools.pairwise(of_rank):
                apart = one.positions.stop < following.first
                assert apart or documents_S[one.first] != documents_S[following.first], f"{one} goes on in {following}"


def _area_by_counting(documents_S: np.ndarray, positions: np.ndarray) -> int:
    return sum(int((documents_S[: position + 1] == documents_S[position]).sum()) for position in positions.tolist())


def test_areas_are_the_pairs_of_queries_and_keys_that_attend() -> None:
    documents_S = _documents(96, 5)
    for kind in CONTEXT_CUTS:
        runs = ContextCut(kind, 96, 2).runs(documents_S)
        assert attention_area(runs) == [_area_by_counting(documents_S, positions_of(one)) for one in runs]


def _fullest_over_mean(cut: ContextCut, documents_S: np.ndarray | None = None) -> float:
    areas = attention_area(cut.runs(documents_S))
    return max(areas) * len(areas) / sum(areas)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_the_balanced_cut_spreads_the_area_of_random_documents_evenly(num_ranks: int) -> None:
    worst = max(_fullest_over_mean(ContextCut("balanced", 4096, num_ranks), _documents(4096, s)) for s in range(40))
    assert worst <= 1.05
    uneven = max(_fullest_over_mean(ContextCut("contiguous", 4096, num_ranks), _documents(4096, s)) for s in range(40))
    assert uneven > 1.05, "the documents are no test of the cut"


def test_zigzag_spreads_the_area_of_one_document_evenly_and_balanced_is_the_same() -> None:
    for num_ranks in (2, 4, 8):
        assert _fullest_over_mean(ContextCut("zigzag", 4096, num_ranks)) <= 1.05
        assert _fullest_over_mean(ContextCut("contiguous", 4096, num_ranks)) > 1.4
        balanced = ContextCut("balanced", 4096, num_ranks).ranges()
        assert sorted(balanced, key=str) == sorted(ContextCut("zigzag", 4096, num_ranks).ranges(), key=str)


def test_zigzag_is_a_chunk_from_the_front_and_one_from_the_back() -> None:
    assert ContextCut("zigzag", 16, 2).ranges() == ((range(0, 4), range(12, 16)), (range(4, 12),))
    assert ContextCut("contiguous", 16, 2).ranges() == ((range(0, 8),), (range(8, 16),))


def test_a_length_that_has_no_equal_parts_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"samples of 20 tokens .* zigzag .*multiple of 8.*--cp-cut"):
        ContextCut("zigzag", 20, 4)
    assert ContextCut("contiguous", 20, 4).num_ranks == 4
