"""What is said of a long evaluation while it goes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from megatron3d.tasks.glue.pace import Pace


def test_a_long_evaluation_tells_its_rate_and_the_time_left_by_tokens() -> None:
    lines: list[str] = []
    times = [0.0]
    pace = Pace("measuring dev", np.array([10] * 50 + [30] * 50), lines.append, clock=lambda: times[0])
    for _ in range(25):
        times[0] += 1.0
        pace.done(2, tokens=20)
    assert lines == [
        "measuring dev: 20 of 100 samples, 2 samples/s, 1 min 30 s left",
        "measuring dev: 40 of 100 samples, 2 samples/s, 1 min 20 s left",
    ]
    for before, after in pairwise(lines):
        assert before != after


def test_a_short_evaluation_and_its_end_are_silent() -> None:
    lines: list[str] = []
    times = [0.0]
    pace = Pace("measuring dev", np.array([10] * 4), lines.append, clock=lambda: times[0])
    times[0] = 9.9
    pace.done(2, tokens=20)
    times[0] = 60.0
    pace.done(2, tokens=20)
    assert lines == []
