"""How far a count may be from its expectation before chance is no excuse."""

from __future__ import annotations

import math

_STANDARD_DEVIATIONS = 4.5  # one false alarm in 150,000 checks; seeds are fixed, so a test that passes stays so


def is_plausible(count: int, trials: int, probability: float) -> bool:
    """Whether `count` of `trials` independent draws is within 4.5 standard deviations of the expected number."""
    slack = _STANDARD_DEVIATIONS * math.sqrt(trials * probability * (1 - probability))
    return abs(count - trials * probability) <= slack
