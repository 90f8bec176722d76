"""--split: Megatron's bounds, no document lost or shared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.data.splits import parse_split, split_documents
from megatron3d.errors import ConfigError


@given(num_documents=st.integers(0, 10**7), shares=st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any))
def test_splits_lie_side_by_side_and_cover_all_documents(num_documents: int, shares: list[int]) -> None:
    train, valid, test = split_documents(num_documents, ",".join(map(str, shares)))
    assert (train.start, test.stop) == (0, num_documents)
    assert (train.stop, valid.stop) == (valid.start, test.start)
    for part, share in zip((train, valid, test), [*shares, 0, 0]):
        assert abs(len(part) - num_documents * share / sum(shares)) <= 1
        assert share or not len(part)


@pytest.mark.parametrize("num_documents", [1, 2, 10, 100, 999, 12345])
@pytest.mark.parametrize("split", ["969,30,1", "969, 30, 1", "99,1,0", "100,0,0", "1,1,1", "0.5,0.25,0.25", "98,2"])
def test_bounds_are_those_of_megatron_core(num_documents: int, split: str) -> None:
    config = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_config", reason="needs megatron-core")
    matrix = config.convert_split_vector_to_split_matrix(config.parse_and_normalize_split(split))
    for ours, bounds in zip(split_documents(num_documents, split), matrix):
        if bounds is None:
            assert len(ours) == 0
        else:
            assert (ours.start, ours.stop) == tuple(round(bound * num_documents) for bound in bounds)


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,2,3,4", "-1,2,0", "nan,1,1", "inf,1,1"])
def test_split_that_makes_no_sense_is_refused(split: str) -> None:
    with pytest.raises(ConfigError, match=r"is not one to three numbers .* such as 969,30,1"):
        parse_split(split)
