"""A seeded shuffle of 0..n-1 that is computed, not stored.

Shuffling n samples normally needs a table of n entries that someone builds and everyone waits for. A block cipher on
numbers below n is a permutation that needs no table: any entry costs the same few operations, on any rank, at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 6
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1  # the mask of 64 bits


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed that is a function of all `parts`, so that each named purpose has its own random numbers."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random bijection of range(size), fixed by `seed`.

    A balanced Feistel network permutes the numbers of 2k bits with 4**(k-1) < size <= 4**k (k at least 1); a result
    outside range(size) is encrypted again until it falls inside, which keeps the map one-to-one. The number of
    repetitions is below 4 on average.

    Source: M. Luby, C. Rackoff, How to Construct Pseudorandom Permutations (1988), for the network (6 rounds here);
    J. Black, P. Rogaway, Ciphers with Arbitrary Finite Domains (2002), section 4, for the cycle walking. The round
    function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014); it is for mixing, not for secrecy.
    """

    size: int
    seed: int

    def __post_init__(self) -> None:
        """Raises: ValueError if there is nothing to permute, or more than 2**62 numbers."""
        if not 1 <= self.size <= 2**62:
            raise ValueError(f"a permutation of {self.size} numbers was asked for; 1 to 2**62 are possible")

    def __getitem__(self, index: int) -> int:
        """Where `index` goes; the same as `many`, without numpy, whose calls on one number take ten times as long.

        Raises: IndexError outside range(size).
        """
        value = int(index)
        if not 0 <= value < self.size:
            raise IndexError(f"index {index} is not in range({self.size})")
        half_bits = self._half_bits
        mask = (1 << half_bits) - 1
        while True:
            left, right = value >> half_bits, value & mask
            for key in self._keys:
                word = (right + key) & _WORD
                word = ((word ^ (word >> 30)) * _MULTIPLIER_1) & _WORD
                word = ((word ^ (word >> 27)) * _MULTIPLIER_2) & _WORD
                left, right = right, left ^ ((word ^ (word >> 31)) & mask)
            value = (left << half_bits) | right
            if value < self.size:
                return value

    def many(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where each of `indices` goes, int64 of the same shape. Raises: IndexError outside range(size)."""
        indices = np.asarray(indices)
        if indices.size and not (indices.min() >= 0 and indices.max() < self.size):
            raise IndexError(f"indices {indices.min()}..{indices.max()} are not all in range({self.size})")
        keys = [np.uint64(key) for key in self._keys]
        values = _feistel(indices.astype(np.uint64), keys, half_bits=self._half_bits)
        while (outside := values >= self.size).any():
            values[outside] = _feistel(values[outside], keys, half_bits=self._half_bits)
        return values.astype(np.int64)

    @cached_property
    def _keys(self) -> tuple[int, ...]:
        return tuple(derive_seed(self.seed, "round", number) for number in range(_NUM_ROUNDS))

    @cached_property
    def _half_bits(self) -> int:
        return max(1, ((self.size - 1).bit_length() + 1) // 2)


@lru_cache(maxsize=256)
def shuffled(size: int, seed: int, purpose: str, epoch: int) -> Permutation:
    """The order of range(size) in one epoch for one purpose. The last 256 are kept, with their keys.

    Raises: ValueError as Permutation does.
    """
    return Permutation(size, derive_seed(seed, purpose, epoch))


def _feistel(values: NDArray[np.uint64], keys: list[np.uint64], *, half_bits: int) -> NDArray[np.uint64]:
    """The network on numbers of 2*half_bits bits: (left, right) -> (right, left xor f(right, key)), once per key."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit of 64-bit words over the whole word, modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return values ^ (values >> np.uint64(31))
