"""How far a long evaluation is, how fast, and when it will be done: a line every few seconds, none for a short one.

The samples of a file are measured from short to long, so the time left is by tokens and not by samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron3d.train.progress import format_duration

_EVERY_S = 10.0


class Pace:
    """Counts the samples of one file."""

    def __init__(
        self,
        name: str,
        lengths_N: NDArray[np.int64],
        log: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is what is done to which file, `lengths_N` the tokens of its samples; `log` takes the lines."""
        self._name, self._num_samples, self._num_tokens = name, len(lengths_N), int(lengths_N.sum())
        self._log, self._clock = log, clock
        self._began_s = self._logged_s = clock()
        self._samples = self._tokens = 0

    def done(self, samples: int, *, tokens: int) -> None:
        """These are done too."""
        self._samples, self._tokens = self._samples + samples, self._tokens + tokens
        now_s = self._clock()
        if now_s - self._logged_s < _EVERY_S or self._samples >= self._num_samples:
            return
        self._logged_s, elapsed_s = now_s, now_s - self._began_s
        left_s = elapsed_s * max(0, self._num_tokens - self._tokens) / self._tokens
        self._log(
            f"{self._name}: {self._samples} of {self._num_samples} samples, {self._samples / elapsed_s:.0f} samples/s, "
            f"{format_duration(left_s)} left"
        )
