"""The rectangles between any two groups of ranks, together, are the mask of the whole sample, each score once."""

from __future__ import annotations

import numpy as np
import pytest

from megatron3d.config.sections.parallel import CONTEXT_CUTS
from megatron3d.nn.context.cut import ContextCut, positions_of
from megatron3d.nn.context.plan import plan_exchange

LENGTH, RANKS = 48, 4


def _documents(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    starts = np.sort(random.choice(np.arange(1, LENGTH), size=seed, replace=False))
    return np.searchsorted(starts, np.arange(LENGTH), side="right")


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("cut", CONTEXT_CUTS)
def test_rectangles_of_all_groups_are_the_mask_of_the_sample(cut: str, group_size: int, is_causal: bool) -> None:
    for number_of_cuts in (0, 1, 5, 20):
        documents_S = _documents(number_of_cuts)
        runs = ContextCut(cut, LENGTH, RANKS).runs(documents_S)
        count_SS = np.zeros((LENGTH, LENGTH), dtype=np.int64)
        groups = [runs[first : first + group_size] for first in range(0, RANKS, group_size)]
        positions = [np.sort(np.concatenate([positions_of(one) for one in group])) for group in groups]
        for number in range(len(groups)):
            plan = plan_exchange([runs], rank=number * group_size, group_size=group_size, is_causal=is_causal)
            for others, (rectangles,) in enumerate(plan.by_group):
                for one in rectangles:
                    queries, keys = positions[number][list(one.queries)], positions[others][list(one.keys)]
                    square = np.ones((len(queries), len(keys)), dtype=np.int64)
                    count_SS[np.ix_(queries, keys)] += np.tril(square) if one.is_causal else square
        same_SS = documents_S[:, None] == documents_S
        expected_SS = same_SS & np.tri(LENGTH, dtype=bool) if is_causal else same_SS
        assert (count_SS == expected_SS).all(), f"{cut}, {number_of_cuts + 1} documents"


def test_an_order_puts_the_positions_of_a_group_in_ascending_order() -> None:
    runs = ContextCut("zigzag", LENGTH, RANKS).runs()
    order_As = plan_exchange([runs], rank=3, group_size=2, is_causal=True).order_BAs[0].numpy()
    positions = np.stack([positions_of(runs[2]), positions_of(runs[3])])
    joined = np.empty(positions.size, dtype=np.int64)
    joined[order_As] = positions
    assert (np.diff(joined) > 0).all()


def test_a_later_chunk_of_a_zigzag_has_all_keys_of_an_earlier_rank_in_one_rectangle() -> None:
    """Chunks r and 7-r of queries attend to chunk s of a rank s before r; chunk 7-r to both of a rank behind."""
    runs = ContextCut("zigzag", LENGTH, RANKS).runs()
    plan = plan_exchange([runs], rank=1, group_size=1, is_causal=True)
    found = [[(one.queries, one.keys, one.is_causal) for one in of_rank[0]] for of_rank in plan.by_group]
    both, early, late = range(12), range(6), range(6, 12)
    assert found[0] == [(both, early, False)]
    assert found[2] == found[3] == [(late, both, False)]
