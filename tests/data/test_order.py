"""The computed shuffle: a bijection for every size, different for every seed, and well mixed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.data.order import Permutation, derive_seed


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_every_number_comes_once(size: int, seed: int) -> None:
    assert sorted(Permutation(size, seed).many(np.arange(size)).tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 2**62), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_one_entry_is_the_same_alone_and_among_others(size: int, seed: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    permutation = Permutation(size, seed)
    images = permutation.many(np.array(indices)).tolist()
    assert images == [permutation[index] for index in indices]
    assert all(0 <= image < size for image in images)
    assert len(set(images)) == len(set(indices))


def test_order_is_pinned_so_that_old_runs_resume_in_the_same_order() -> None:
    assert Permutation(10, 1234).many(np.arange(10)).tolist() == [5, 4, 7, 2, 0, 8, 6, 3, 1, 9]
    assert Permutation(10**12, 1234)[0] == 578_659_617_568


def test_mean_displacement_is_that_of_a_random_permutation() -> None:
    """For a uniform permutation of n, E|p(i) - i| = (n*n - 1) / (3n), with a relative deviation of order n**-0.5."""
    size = 20_000
    index = np.arange(size)
    for seed in range(5):
        displacement = np.abs(Permutation(size, seed).many(index) - index).mean()
        assert displacement == pytest.approx(size / 3, rel=0.03)


def test_neighbours_do_not_stay_neighbours() -> None:
    """A uniform permutation keeps about 2 of n pairs (i, i+1) next to each other."""
    images = Permutation(20_000, 7).many(np.arange(20_000))
    assert (np.abs(np.diff(images)) == 1).sum() < 12


def test_position_of_each_entry_is_uniform_over_seeds() -> None:
    """Chi-square of where entry 0 of 16 goes over 3,200 seeds: 15 degrees of freedom, 37.7 is the 0.1 % quantile."""
    counts = np.bincount([Permutation(16, seed)[0] for seed in range(3200)], minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 37.7


def test_outside_is_refused() -> None:
    with pytest.raises(IndexError, match=r"range\(5\)"):
        Permutation(5, 0)[5]
    with pytest.raises(IndexError, match=r"range\(5\)"):
        Permutation(5, 0)[-1]
    with pytest.raises(ValueError, match="of 0 numbers"):
        Permutation(0, 0)


def test_seeds_tell_their_parts_apart() -> None:
    parts = [(1, 23), (12, 3), (1, "23"), (123,), ("1", 23)]
    assert len({derive_seed(*of) for of in parts}) == len(parts)
