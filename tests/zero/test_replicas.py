"""The hash of a tensor's bits against its definition in Python's integers, and what it must tell apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron3d.zero.replicas import bit_hash, odd_weights

WEIGHTS = odd_weights(8, torch.device("cpu"))
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def hash_in_integers(bits: list[int], power: int = 1) -> int:
    """The sum of elements times weights in chunks of eight, then of the chunks' sums times their squares, mod 2**64."""
    weights = [weight**power for weight in WEIGHTS.tolist()]
    sums = [sum(b * w for b, w in zip(bits[at : at + 8], weights)) for at in range(0, len(bits), 8)]
    wrapped = [(one + 2**63) % 2**64 - 2**63 for one in sums]
    return wrapped[0] if len(wrapped) == 1 else hash_in_integers(wrapped, 2 * power)


def noise(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(0)).to(dtype)


def hash_of(data: Tensor) -> int:
    return int(bit_hash(data, WEIGHTS))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 65, 600])
def test_it_is_the_sum_of_bits_times_weights_modulo_two_to_the_64(length: int, dtype: torch.dtype) -> None:
    data = noise(length, dtype)
    assert hash_of(data) == hash_in_integers(data.view(INTEGERS[dtype]).tolist())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 599), st.integers(0, 31))
def test_any_flipped_bit_changes_it(at: int, bit: int) -> None:
    data = noise(600)
    before = hash_of(data)
    data.view(torch.int32)[at] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert hash_of(data) != before


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 599), st.integers(0, 599))
def test_any_two_swapped_elements_change_it(one: int, other: int) -> None:
    data = noise(600)
    before, unlike = hash_of(data), data[one] != data[other]
    data[[one, other]] = data[[other, one]]
    assert (hash_of(data) != before) == bool(unlike)


def test_no_two_places_count_alike() -> None:
    """The weight of a place is the hash of a tensor with a one there alone."""
    ones = torch.eye(600, dtype=torch.int32)
    assert len({hash_of(row) for row in ones}) == 600


def test_every_weight_has_an_inverse_and_none_comes_twice() -> None:
    weights = odd_weights(1 << 16, torch.device("cpu"))
    assert bool((weights % 2 != 0).all())
    assert len(weights.unique()) == len(weights)
