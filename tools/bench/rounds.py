"""Interleaved rounds: every competitor has its turn in each, so that a machine whose speed drifts is fair to all.

A figure is the median over the rounds; a ratio is made within a round and its median is taken over the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass


class TurnFailed(Exception):
    """A competitor cannot go on; the message says which and why."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one competitor is as another: median, lowest and highest of the rounds."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


def take_turns(turns: Mapping[str, Callable[[], float]], num_rounds: int) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of each competitor in each round, and the messages of those whose turn failed, which are left out.

    Each callable takes one turn and returns its seconds, or raises TurnFailed. Every other round goes backwards, so
    that no competitor always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    failures: list[str] = []
    for number in range(num_rounds):
        for name in list(seconds) if number % 2 == 0 else list(reversed(seconds)):
            try:
                seconds[name].append(turns[name]())
            except TurnFailed as failure:
                failures.append(str(failure))
                del seconds[name]
    return seconds, failures


def speed_ratio(seconds: list[float], others: list[float]) -> Ratio:
    """How many times as fast a competitor with `seconds` is as one with `others`, round by round."""
    ratios = [other / own for own, other in zip(seconds, others, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
