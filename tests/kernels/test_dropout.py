"""The bits of dropout: against published outputs, the definition in Python integers, and what chance would give.

Seeds are fixed, so a statistic is the same at every run; bounds are those that chance exceeds once in a million.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron3d_kernels import Registry
from megatron3d_kernels.dropout import child_keys, dropout, keep_mask, kept_scale
from torch import Tensor

MASK = (1 << 64) - 1
# Outputs of splitmix64.c (Vigna, prng.di.unimi.it) for two seeds; the second list is that of rosettacode.org.
PUBLISHED = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC],
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
}


def output(key: int, number: int) -> int:
    """Output `number` of SplitMix64, in Python integers."""
    z = (key + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def is_kept(key: int, element: int, probability: float) -> bool:
    """The definition in the kernel's docstring, element by element."""
    bits = (output(key & MASK, element // 4) >> (16 * (element % 4))) & 0xFFFF
    signed = bits - 0x10000 if bits & 0x8000 else bits
    return signed >= min(round(probability * 65536), 65535) - 32768


@pytest.mark.parametrize("seed", PUBLISHED)
def test_outputs_are_those_that_splitmix64_is_published_with(seed: int) -> None:
    found = child_keys(seed, torch.arange(len(PUBLISHED[seed]))).tolist()
    assert [one & MASK for one in found] == PUBLISHED[seed]
    assert [output(seed, number) for number in range(len(PUBLISHED[seed]))] == PUBLISHED[seed]


KEYS = st.integers(-(1 << 63), (1 << 63) - 1)


@given(st.lists(KEYS, min_size=1, max_size=3), st.integers(1, 11), st.floats(0, 1, exclude_max=True))
def test_every_element_is_kept_as_the_definition_has_it(keys: list[int], width: int, probability: float) -> None:
    mask = keep_mask(torch.tensor(keys), width, probability)
    assert mask.tolist() == [[is_kept(key, element, probability) for element in range(width)] for key in keys]


@given(KEYS, st.integers(0, 1 << 40))
def test_keys_of_keys_are_outputs_of_their_parents(key: int, number: int) -> None:
    assert int(child_keys(torch.tensor([key]), torch.tensor([number]))) & MASK == output(key & MASK, number)
    assert int(child_keys(key, torch.tensor(number))) & MASK == output(key & MASK, number)


def test_rows_in_many_chunks_are_the_rows_one_by_one() -> None:
    keys = child_keys(5, torch.arange(7))
    wide = keep_mask(keys, 100_000, 0.3)  # 25,000 outputs a row, of which two and a half rows make a chunk
    assert all(torch.equal(wide[row], keep_mask(keys[row], 100_000, 0.3)) for row in range(7))
    assert torch.equal(wide[:, :1001], keep_mask(keys, 1001, 0.3)), "a row's mask depends on its length"


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (), (2, 3, 5)])
def test_keys_of_any_shape_and_rows_of_no_elements_are_taken(shape: tuple[int, ...]) -> None:
    keys = child_keys(1, torch.zeros(shape[:-1], dtype=torch.int64))
    width = shape[-1] if shape else 7
    assert keep_mask(keys, width, 0.5).shape == (*shape[:-1], width)


# --- Statistics -------------------------------------------------------------------------------------------------------

SITES, SAMPLES, POSITIONS, WIDTH = 8, 8, 32, 256


def masks(probability: float) -> Tensor:
    """Masks of all sites, samples and positions, [8, 8, 32, 256], whose keys are as close as keys can be."""
    sites = torch.arange(SITES).view(-1, 1, 1)
    samples = child_keys(sites, torch.arange(SAMPLES).unsqueeze(1))
    return keep_mask(child_keys(samples, torch.arange(POSITIONS)), WIDTH, probability)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_chance_would_drop_in_all_and_in_every_slice(probability: float) -> None:
    dropped = (~masks(probability)).double()
    variance = probability * (1 - probability)
    assert abs(float(dropped.mean()) - probability) < 4.9 * (variance / dropped.numel()) ** 0.5
    for dims in [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (2, 3), (3,)]:
        count = 1
        for dim in dims:
            count *= dropped.shape[dim]
        z = (dropped.mean(dims) - probability) / (variance / count) ** 0.5
        # Chi-square with n degrees of freedom has mean n and variance 2n.
        assert abs(float(z.square().sum()) - z.numel()) < 4.9 * (2 * z.numel()) ** 0.5, f"slices over {dims}"


def test_neighbours_along_every_axis_and_lanes_of_a_word_drop_independently() -> None:
    """A table of two by two for each pair of neighbours: chi-square with three degrees of freedom below 30.7."""
    mask = masks(0.5)
    pairs = {f"axis {dim}": (mask.narrow(dim, 0, mask.shape[dim] - 1), mask.narrow(dim, 1, mask.shape[dim] - 1))
             for dim in range(4)}  # fmt: skip
    lanes = mask.unflatten(-1, (-1, 4))
    pairs |= {f"lanes {a} {b}": (lanes[..., a], lanes[..., b]) for a in range(4) for b in range(a)}
    for name, (first, second) in pairs.items():
        table = torch.bincount((2 * first.int() + second.int()).flatten(), minlength=4).double()
        expected = first.numel() / 4
        assert float(((table - expected).square() / expected).sum()) < 30.7, f"{name}: {table.tolist()}"


def test_the_sixteen_bits_are_spread_evenly() -> None:
    """Thresholds at sixteenths cut the bits into sixteen cells of equal chance: chi-square, 15 degrees, below 56.5."""
    kept = torch.tensor([int(masks(step / 16).sum()) for step in range(16)] + [0]).double()
    cells = kept[:-1] - kept[1:]
    expected = SITES * SAMPLES * POSITIONS * WIDTH / 16
    assert float(((cells - expected).square() / expected).sum()) < 56.5


# --- Dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kept_elements_are_scaled_and_the_gradient_is_dropped_and_scaled_alike(dtype: torch.dtype) -> None:
    keys = child_keys(3, torch.arange(40))
    x = torch.randn(40, 51, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = Registry().dropout(x, keys, 0.3)
    expected = torch.where(keep_mask(keys, 51, 0.3), x.detach().double() / (1 - 0.3), 0.0)
    # The probability rounds to 16 bits, and the result to the dtype.
    tolerance = 2**-17 / (1 - 0.3) + torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad.double(), (expected != 0).double() / (1 - 0.3), rtol=tolerance, atol=0)


def test_the_mask_depends_on_keys_and_columns_and_not_on_strides() -> None:
    keys, x = child_keys(1, torch.arange(30)), torch.ones(30, 40)
    assert torch.equal(dropout(x.t().contiguous().t(), keys, 0.5), dropout(x, keys, 0.5))


def test_the_smallest_and_largest_probabilities_round_to_none_and_to_nearly_all() -> None:
    keys, ones = child_keys(1, torch.arange(200)), torch.ones(200, 500)
    assert torch.equal(dropout(ones, keys, 1e-6), ones) and kept_scale(1e-6) == 1.0
    assert torch.isfinite(dropout(ones, keys, 1 - 1e-9)).all()


def test_the_global_generator_is_neither_read_nor_advanced() -> None:
    keys = child_keys(1, torch.arange(4))
    torch.manual_seed(5)
    before, first = torch.random.get_rng_state(), keep_mask(keys, 64, 0.5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(keep_mask(keys, 64, 0.5), first)


@pytest.mark.parametrize("has_residual", [False, True])
def test_large_tensors_are_dropped_by_chunks_to_the_bit_as_small_ones_and_keep_no_mask(has_residual: bool) -> None:
    """Rows one by one are small; all of them are dropped in two chunks and a part of one."""
    random = torch.Generator().manual_seed(1)
    x, residual, grad = (torch.randn(700, 600, generator=random) for _ in range(3))
    keys, saved, found = child_keys(3, torch.arange(700)), [], []
    for rows in ([slice(0, 700)], [slice(row, row + 1) for row in range(700)]):
        leaves = [one.clone().requires_grad_() for one in ((x, residual) if has_residual else (x,))]
        with torch.autograd.graph.saved_tensors_hooks(lambda one: (saved.append(one.nbytes), one)[1], lambda one: one):
            parts = [
                dropout(leaves[0][some], keys[some], 0.3, residual=leaves[1][some] if has_residual else None)
                for some in rows
            ]
        y = torch.cat(parts)
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
        if len(rows) == 1:
            assert sum(saved) == keys.nbytes
    assert all(torch.equal(large, small) for large, small in zip(*found, strict=True))
