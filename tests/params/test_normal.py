"""Normal numbers by index: those of every box are equal, their bits are SplitMix64's, their distribution is normal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from megatron3d.params import normal
from megatron3d.params.boxes import Box
from megatron3d.params.normal import fill_normal

SEED = 2**63 + 12345  # with the highest bit


def drawn(shape: tuple[int, ...], box: Box | None = None, *, seed: int = SEED, std: float = 1.0) -> Tensor:
    box = box or Box((0,) * len(shape), shape)
    out = torch.full(box.size, float("nan"))
    fill_normal(out, box, shape, std=std, seed=seed)
    return out


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)))
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    size = tuple(draw(st.integers(1, whole - first)) for whole, first in zip(shape, offset, strict=True))
    return shape, Box(offset, size)


@given(boxes(), st.sampled_from([1, 3, 1 << 15]))
def test_a_box_holds_the_numbers_of_the_whole(case: tuple[tuple[int, ...], Box], block: int) -> None:
    shape, box = case
    whole = drawn(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normal, "_BLOCK", block)  # words at once are a matter of speed alone
        assert torch.equal(drawn(shape, box), whole[box.slices()])


def splitmix64(state: int) -> int:
    """The output that SplitMix64 gives from a state that has been advanced, with Python's whole numbers."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_hash_gives_the_published_outputs() -> None:
    """Source: the first outputs of SplitMix64 from seed 1234567, as its reference implementation prints them."""
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    assert tuple(splitmix64(1234567 + number * 0x9E3779B97F4A7C15) for number in (1, 2, 3)) == published


def test_numbers_are_box_muller_of_the_bits_of_their_place() -> None:
    """Each number by the formula in fp64, with the middle of the range of u that 16 bits stand for."""
    rows, columns, std = 9, 30, 0.5
    whole = drawn((3, 3, columns), std=std).view(rows, columns)
    for row in range(rows):
        for column in range(columns):
            bits = splitmix64(SEED + 0x9E3779B97F4A7C15 * (row * 8 + column // 4))
            half = bits >> (32 * (column % 4 // 2))
            u, angle = (half % 2**16 + 0.5) / 2**16, 2 * math.pi * (half // 2**16 % 2**16 + 0.5) / 2**16
            expected = std * math.sqrt(-2 * math.log(u)) * (math.sin if column % 2 else math.cos)(angle)
            assert float(whole[row, column]) == pytest.approx(expected, rel=0.02 if u < 0.001 else 1e-4, abs=1e-6)


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_moments_are_those_of_a_normal_distribution(std: float) -> None:
    values = drawn((2048, 1024), std=std).flatten().double().numpy() / std
    n = len(values)
    z = {
        "mean": values.mean() * n**0.5,
        "variance": (values.var() - 1.0) * (n / 2) ** 0.5,
        "skewness": stats.skew(values) * (n / 6) ** 0.5,
        "kurtosis": stats.kurtosis(values) * (n / 24) ** 0.5,
    }
    assert max(map(abs, z.values())) < 4.0, z


def test_all_values_of_the_tables_have_a_variance_of_one() -> None:
    """So the standard deviation is exactly that which is asked for: over all bits, not over a sample."""
    radii = normal._radii(1.0).view(torch.float32).double()
    directions = normal._directions().view(torch.float32).double()
    assert abs(radii.square().mean() * directions.square().mean() - 1.0) < 1e-7
    assert abs(directions.mean()) < 1e-8
    assert len(radii) == len(directions) == 2 * 2**16


def test_the_distribution_is_normal_up_to_beyond_four_deviations() -> None:
    values = drawn((2048, 1024)).flatten().double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    for bound in (1.0, 2.0, 3.0, 4.0, 4.4):
        expected = 2 * stats.norm.sf(bound) * len(values)
        assert abs((np.abs(values) > bound).sum() - expected) < 4 * expected**0.5, bound
    assert 4.5 < np.abs(values).max() < 5.0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (drawn((512, 1024)), drawn((512, 1024), seed=SEED + 1)),
        (drawn((512, 1024)), drawn((512, 1024), seed=SEED ^ 2**63)),
        (drawn((512, 1024))[:-1], drawn((512, 1024))[1:]),
        (drawn((512, 1024))[:, :-1], drawn((512, 1024))[:, 1:]),
        (drawn((512, 1024))[:, :-2], drawn((512, 1024))[:, 2:]),
        (drawn((512, 1024))[:, :-4], drawn((512, 1024))[:, 4:]),
    ],
    ids=["next-seed", "highest-bit", "rows", "columns", "pairs", "words"],
)
def test_numbers_of_neighbours_and_of_other_seeds_are_independent(first: Tensor, second: Tensor) -> None:
    """Their products, and those of their squares, have the means of independent normal numbers."""
    x, y = first.double().flatten(), second.double().flatten()
    assert abs((x * y).mean()) * len(x) ** 0.5 < 4.0
    assert abs(((x.square() - 1) * (y.square() - 1) / 2).mean()) * len(x) ** 0.5 < 4.0
    assert not torch.equal(x, y)


def test_a_matrix_has_the_singular_values_of_a_random_one() -> None:
    """Source: Marchenko and Pastur 1967: those of an n x n matrix reach from 0 to 2 sqrt(n)."""
    values = torch.linalg.svdvals(drawn((256, 256)).double()) / 256**0.5
    assert 1.9 < values[0] < 2.05 and values[-1] < 0.02
    assert abs(values.square().mean() - 1.0) < 0.02
