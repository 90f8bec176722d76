"""The hash of a tensor's bits against its definition in Python's integers, and what it must tell apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron3d.zero import replicas
from megatron3d.zero.replicas import bit_hash, odd_weights

WEIGHTS = odd_weights(8, torch.device("cpu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def words_of(data: Tensor) -> list[int]:
    """Eight bytes each, little-endian, the last filled up with zeros."""
    content = data.view(torch.uint8).numpy().tobytes()
    return [
        int.from_bytes(content[at : at + 8], "little", signed=at + 8 <= len(content))
        for at in range(0, len(content), 8)
    ]


def hash_in_integers(bits: list[int], power: int = 1) -> int:
    """The sum of words times weights in chunks of eight, then of the chunks' sums times their squares, mod 2**64."""
    weights = [weight**power for weight in WEIGHTS.tolist()]
    sums = [sum(b * w for b, w in zip(bits[at : at + 8], weights)) for at in range(0, len(bits), 8)]
    wrapped = [(one + 2**63) % 2**64 - 2**63 for one in sums]
    return wrapped[0] if len(wrapped) == 1 else hash_in_integers(wrapped, 2 * power)


def noise(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(0)).to(dtype)


def hash_of(data: Tensor) -> int:
    return int(bit_hash(data, WEIGHTS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 65, 600])
def test_it_is_the_sum_of_bits_times_weights_modulo_two_to_the_64(length: int, dtype: torch.dtype) -> None:
    data = noise(length, dtype)
    assert hash_of(data) == hash_in_integers(words_of(data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_it_does_not_depend_on_where_the_values_lie(dtype: torch.dtype) -> None:
    data = noise(75).mul(50).to(dtype)
    for offset in range(4):
        room = torch.zeros(offset + 75, dtype=dtype)
        room[offset:] = data
        assert hash_of(room[offset:]) == hash_of(data)


@pytest.mark.parametrize("length", [0, 5, 700])
def test_devices_without_a_product_of_integers_get_the_same(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(length)
    expected = hash_of(data)
    monkeypatch.setattr(replicas, "_dot", lambda words, weights: (words * weights).sum())
    assert hash_of(data) == expected


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
