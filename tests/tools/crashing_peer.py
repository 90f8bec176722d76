"""A peer of the benchmarks that starts well and breaks in its third step."""

from __future__ import annotations

import itertools

from tools.bench.peers.trainee import Trainee
from tools.bench.peers.work import Work


def build(work: Work) -> Trainee:
    """No model at all."""
    numbers = itertools.count(1)

    def step() -> float:
        if (number := next(numbers)) > 2:
            raise RuntimeError(f"the flux capacitor is empty in step {number}")
        return 1.0

    return Trainee(step, num_parameters=1)
