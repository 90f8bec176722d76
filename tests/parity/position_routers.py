"""Routers of a user's own, for `--random-ltd-router`; the sequences of the tests that use them have 64 positions."""

from __future__ import annotations


def keep_all(step: int, layer: int, sample: int) -> list[int]:
    """Every position, so that nothing is dropped but everything goes the way of what is kept."""
    return list(range(64))


def keep_half(step: int, layer: int, sample: int) -> list[int]:
    """Every second position, the even or the odd ones."""
    return list(range((step + layer + sample) % 2, 64, 2))
