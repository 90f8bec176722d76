"""StepClock: how long each step took, without waiting for a device that still works on it.

On a CPU a step is over when its call returns. A GPU then still makes the update and the gathers, while the host reports
the step and begins the next one, whose losses it waits for: so in a row of steps each lasts from the end of the call
before it to the end of its own call, which is the time the device takes for one. Before anything else is timed the
device is waited for, and the step after that begins by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from megatron3d.comm.device import runs_ahead, synchronize


class StepClock:
    """The clock of one run's steps: `begin` and `end` around each, `pause` before work that is not part of a step."""

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._device, self._clock = device, clock
        self._began_s = 0.0
        self._last_ended_s: float | None = None  # None where the device has no work of a step left

    def begin(self) -> None:
        """A step begins."""
        self._began_s = self._clock() if self._last_ended_s is None else self._last_ended_s

    def end(self) -> float:
        """Its call has returned; the seconds it took."""
        now_s = self._clock()
        self._last_ended_s = now_s if runs_ahead(self._device) else None
        return now_s - self._began_s

    def pause(self) -> None:
        """Wait for what is left of the last step, so that its time is not taken for that of what comes now."""
        if self._last_ended_s is not None:
            synchronize(self._device)
            self._last_ended_s = None
