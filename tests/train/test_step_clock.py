"""Times of steps that a device works on after their call, without a wait for it in between."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron3d.train import step_clock
from megatron3d.train.step_clock import StepClock

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Time:
    """A host that makes steps: it waits for losses 3 s after it queued them, then queues an update of 2 s."""

    now_s = 0.0
    device_done_s = 0.0
    waits = 0

    def step(self, clock: StepClock) -> float:
        clock.begin()
        self.now_s = self.device_done_s = max(self.now_s, self.device_done_s) + 3.0
        self.device_done_s += 2.0
        return clock.end()

    def synchronize(self, device: torch.device) -> None:
        self.waits += 1
        self.now_s = max(self.now_s, self.device_done_s)


def test_steps_in_a_row_take_what_the_device_takes_and_nothing_waits_between_them() -> None:
    time = Time()
    clock = StepClock(GPU, clock=lambda: time.now_s)
    with mock.patch.object(step_clock, "synchronize", time.synchronize):
        found = []
        for _ in range(4):
            found.append(time.step(clock))
            time.now_s += 0.5  # a line is written while the device updates
        assert found == [3.0, 5.0, 5.0, 5.0] and time.waits == 0
        clock.pause()
        clock.pause()
        assert time.now_s == time.device_done_s and time.waits == 1
        time.now_s += 100.0  # an evaluation
        assert time.step(clock) == 3.0


def test_a_step_of_a_cpu_ends_with_its_call_and_what_comes_between_is_of_no_step() -> None:
    now_s = iter([0.0, 3.0, 10.0, 14.0])
    clock = StepClock(CPU, clock=lambda: next(now_s))
    found = []
    for _ in range(2):
        clock.begin()
        found.append(clock.end())
        clock.pause()
    assert found == pytest.approx([3.0, 4.0])
