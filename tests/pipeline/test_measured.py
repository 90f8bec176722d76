"""Measured timelines of real processes whose stages take a known time, against the simulation of these times.

By default the time is logical: stages add their seconds to a clock of their rank, and each message brings its sender's
time along. So the timeline is exact whatever else the machine does. A slow test sleeps in real time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

from megatron3d.comm.collectives import Pending
from megatron3d.comm.device import Clock
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Axis, Mesh, make_mesh
from megatron3d.comm.p2p import Message, start_exchange
from megatron3d.errors import StorageError
from megatron3d.params.grads import GradSink
from megatron3d.pipeline.draw.measured import in_milliseconds, trace_events, write_profile
from megatron3d.pipeline.lower import lower
from megatron3d.pipeline.measured import (
    Measured,
    PipelineRecorder,
    comparison_line,
    measured_costs,
    measured_from,
)
from megatron3d.pipeline.orders.named import build_schedule, virtual_of
from megatron3d.pipeline.run import Backward, Wire, run
from megatron3d.pipeline.schedule import Op, Recv, Reduce, Schedule, Send, Step
from megatron3d.pipeline.simulate import Costs, simulate
from tests.dist.pool import Pool

# Sleep of a rank's stages for a forward, one try after the other: what else runs on the machine can only add idle time,
# 1 ms to a message and more when it is busy, so a try that it spoiled is repeated, with longer sleep in the end.
NAPS_S = (0.08, 0.08, 0.16, 0.16, 0.32, 0.64)
SHAPE = (2, 1, 4)


class LogicalClock:
    """Seconds that this rank's stages claimed to take, and those of the messages it waited for."""

    def __init__(self) -> None:
        self.now = 0.0

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def mark(self) -> float:
        return self.now

    def settle(self) -> None:
        pass

    def seconds_between(self, start: float, end: float) -> float:
        return end - start

    def start_exchange(self, messages: Sequence[Message], axis: Axis) -> list[Pending]:
        """The exchange, whose outgoing tensors carry the time at which they leave."""
        stamped = [replace(m, tensor=torch.full_like(m.tensor, self.now)) if m.sends else m for m in messages]
        started = start_exchange(stamped, axis)
        return [p if m.sends else _Dated(p, self) for m, p in zip(messages, started)]


class _Dated:
    """A message on its way, whose arrival is not before it left."""

    def __init__(self, pending: Pending, clock: LogicalClock) -> None:
        self.pending, self.clock = pending, clock

    def wait(self) -> Tensor:
        tensor = self.pending.wait()
        self.clock.now = max(self.clock.now, float(tensor.max()))
        return tensor

    def is_done(self) -> bool:
        return self.pending.is_done()


class _Nap(torch.autograd.Function):
    """The identity, which sleeps in the backward and leaves as much sleep to the weight gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, sink: GradSink, nap: Callable[[], None]) -> Tensor:
        ctx.weight, ctx.sink, ctx.nap = weight, sink, nap
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.nap()
        sink, nap = ctx.sink, ctx.nap
        if sink._deferred is None:
            nap()
        else:
            sink._deferred.append(nap)
        return grad.clone(), None, None, None


class SleepingStage(nn.Module):
    """Takes `seconds` for a forward, for an input gradient and for a weight gradient, and computes nothing."""

    def __init__(self, seconds: float, sink: GradSink, pass_time: Callable[[float], None], *, is_last: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds, self.sink, self.pass_time, self.is_last = seconds, sink, pass_time, is_last

    def nap(self) -> None:
        self.pass_time(self.seconds)

    def forward(self, x: Tensor | None, micro: None) -> Tensor:
        self.nap()
        start = torch.zeros(SHAPE, requires_grad=True) if x is None else x
        y = _Nap.apply(start, self.weight, self.sink, self.nap)
        return y.sum() if self.is_last else y


def _sleep_through(rank: int, world_size: int, schedules: list[Schedule], nap_s: float) -> list[Measured]:
    """Run each schedule once and measure it; once before without sleep, which makes the connections."""
    mesh = make_mesh(Layout(pp=world_size))
    measured = []
    for schedule in schedules:
        _run(mesh, schedule, 0.0)
        measured.append(_run(mesh, schedule, nap_s * schedule.num_ranks / schedule.num_stages))
    return measured


def _claim_through(rank: int, world_size: int, schedules: list[Schedule]) -> list[Measured]:
    """Run each schedule once, in logical time; each stage of a rank's only one takes one second."""
    mesh = make_mesh(Layout(pp=world_size))
    measured = []
    for schedule in schedules:
        clock = LogicalClock()
        with patch("megatron3d.pipeline.run.start_exchange", clock.start_exchange):
            measured.append(_run(mesh, schedule, schedule.num_ranks / schedule.num_stages, clock))
    return measured


def _run(mesh: Mesh, schedule: Schedule, seconds: float, clock: LogicalClock | None = None) -> Measured:
    """One measured run with stages that take so long: asleep, or by a logical clock."""
    wire = Wire(mesh.pp, [SHAPE] * schedule.num_microbatches, torch.float32, torch.device("cpu"))
    sink = GradSink()
    stages = {
        stage: SleepingStage(
            seconds, sink, clock.pass_time if clock else time.sleep, is_last=stage == schedule.num_stages - 1
        )
        for stage, place in enumerate(schedule.stage_to_rank)
        if place == mesh.pp.rank
    }
    run(
        schedule,
        lower(schedule)[mesh.pp.rank],
        stages,
        [None] * schedule.num_microbatches,
        wire=wire,
        backward=Backward(sink, lambda stage: None),
        recorder=(recorder := PipelineRecorder(mesh.pp, clock or Clock(wire.device))),
    )
    return recorder.gather()


def nominal(schedule: Schedule, nap_s: float) -> Costs:
    """What the stages sleep, in seconds."""
    share = schedule.num_ranks / schedule.num_stages
    return Costs(
        forward=nap_s,
        backward=2 * nap_s,
        input_grad=nap_s,
        weight_grad=nap_s,
        stage_factors=(share,) * schedule.num_stages,
    )


SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_in_logical_time_every_step_begins_and_ends_when_the_simulation_says(pool: Pool, num_ranks: int) -> None:
    schedules = [
        build_schedule(name, num_ranks=num_ranks, num_microbatches=microbatches, virtual=virtual_of(name) or 2)
        for name in SCHEDULES
        for microbatches in (num_ranks, 2 * num_ranks)
    ]
    for measured in pool.run(num_ranks, _claim_through, schedules)[0]:
        timeline = measured.timeline
        expected = simulate(timeline.schedule, nominal(timeline.schedule, 1.0))
        assert sum(expected.idle) > 0
        assert set(timeline.steps) == set(expected.steps), timeline.schedule.name
        assert timeline.idle == expected.idle
        assert timeline.bubble_fraction == expected.bubble_fraction


@pytest.mark.slow  # real time: what else runs on the machine adds to it
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_measured_idle_time_is_within_a_tenth_of_the_simulated_one(pool: Pool, num_ranks: int) -> None:
    schedules = [
        build_schedule(name, num_ranks=num_ranks, num_microbatches=num_ranks, virtual=virtual_of(name) or 2)
        for name in SCHEDULES
    ]
    best = dict.fromkeys((schedule.name for schedule in schedules), float("inf"))
    for nap_s in NAPS_S:
        late = [schedule for schedule in schedules if best[schedule.name] > 1.1]
        for measured in pool.run(num_ranks, _sleep_through, late, nap_s)[0] if late else []:
            timeline, name = measured.timeline, measured.timeline.schedule.name
            expected = simulate(timeline.schedule, nominal(timeline.schedule, nap_s))
            best[name] = min(best[name], sum(timeline.idle) / sum(expected.idle))
            for rank, row in enumerate(timeline.schedule.rows):
                assert tuple(timed.step for timed in timeline.steps if timed.rank == rank) == row
    assert all(0.9 <= ratio <= 1.1 for ratio in best.values()), [*best.values()]


def by_hand() -> Measured:
    """Two ranks and two microbatches of 1F1B, with a zero 5 s before the first step and one second between steps."""
    schedule = build_schedule("1f1b", num_ranks=2, num_microbatches=1)
    first = [
        (Step(Op.F, 0, 0), 5.0, 6.0),
        (Recv("gradient", 0, 0, 1), 7.0, 10.5),
        (Step(Op.B, 0, 0), 10.5, 12.5),
        (Reduce(0), 12.5, 12.75),
    ]
    second = [
        (Recv("activation", 1, 0, 0), 5.25, 6.5),
        (Step(Op.F, 1, 0), 6.5, 7.5),
        (Step(Op.B, 1, 0), 7.5, 10.5),
        (Reduce(1), 10.5, 10.5),
        (Send("gradient", 1, 0, 0), 10.5, 10.625),
    ]
    return measured_from(schedule, [first, second])


def test_records_become_a_timeline_that_starts_with_the_first_step():
    measured = by_hand()
    timeline = measured.timeline
    assert (timeline.span, timeline.busy, timeline.idle) == (7.5, (3.0, 4.0), (4.5, 3.5))
    assert timeline.peak_live_activations == (1, 1)
    assert [(t.rank, t.step.op, t.start, t.end) for t in timeline.steps] == [
        (0, Op.F, 0.0, 1.0),
        (1, Op.F, 1.5, 2.5),
        (1, Op.B, 2.5, 5.5),
        (0, Op.B, 5.5, 7.5),
    ]
    assert measured.waiting_s == (3.5, 1.375)
    costs = measured_costs(timeline)
    assert (costs.forward, costs.backward) == (1.0, 2.5)
    assert costs.stage_factors == pytest.approx((3 / 3.5, 4 / 3.5))


def test_the_comparison_names_the_measured_and_the_simulated_bubble():
    words = comparison_line(by_hand())
    assert words.startswith("1f1b: measured bubble 53.3% of 7500.0 ms (waiting for messages 32.5%); simulated")
    assert words.endswith("50.0% of 7000.0 ms")


class _Counter:
    """A clock that ticks once for each moment."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1.0
        return self.now

    def settle(self) -> None:
        pass

    def seconds_between(self, start: float, end: float) -> float:
        return end - start


def test_waiting_inside_a_step_is_not_time_of_the_step():
    schedule = build_schedule("forward-only", num_ranks=1, num_microbatches=1)
    recorder = PipelineRecorder(make_mesh(Layout()).pp, _Counter())
    recorder.start(schedule)
    step, recv = Step(Op.F, 0, 0), Recv("activation", 0, 0, 1)
    recorder.begin(step)  # 2
    recorder.begin(recv)  # 3
    recorder.end()  # 4
    recorder.end()  # 5
    measured = recorder.gather()
    assert [(t.step, t.start, t.end) for t in measured.timeline.steps] == [(step, 0.0, 1.0)]
    assert [(w.what, w.start, w.end) for w in measured.waits] == [(recv, -1.0, 0.0)]


def test_a_recorder_that_no_run_was_given_says_so():
    with pytest.raises(ValueError, match="recorder of pipeline rank 0 was not handed to a run"):
        PipelineRecorder(make_mesh(Layout()).pp, Clock(torch.device("cpu"))).gather()


def test_the_trace_has_a_process_for_each_rank_with_a_thread_for_steps_and_one_for_waits():
    events = trace_events(by_hand())["traceEvents"]
    names = {(e["pid"], e.get("tid"), e["name"], e["args"].get("name")) for e in events if e["ph"] == "M"}
    for rank in (0, 1):
        assert (rank, None, "process_name", f"pipeline rank {rank}") in names
        assert {(rank, 0, "thread_name", "compute"), (rank, 1, "thread_name", "waits")} <= names
    slices = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert set(slices) == {
        (0, 0, "forward 0", 0.0, 1e6),
        (1, 0, "forward 0", 1.5e6, 1e6),
        (1, 0, "backward 0", 2.5e6, 3e6),
        (0, 0, "backward 0", 5.5e6, 2e6),
        (0, 1, "wait for gradient 0", 2e6, 3.5e6),
        (0, 1, "start reduction of stage 0", 7.5e6, 0.25e6),
        (1, 1, "wait for activation 0", 0.25e6, 1.25e6),
        (1, 1, "start reduction of stage 1", 5.5e6, 0.0),
        (1, 1, "wait until gradient 0 has left", 5.5e6, 0.125e6),
    }


def test_a_profile_is_a_picture_and_a_trace_in_a_new_folder(tmp_path: Path):
    line = write_profile(by_hand(), tmp_path / "new" / "folder", name="step7")
    trace = json.loads((tmp_path / "new" / "folder" / "step7.trace.json").read_text())
    assert trace == trace_events(by_hand())
    assert imread(tmp_path / "new" / "folder" / "step7.png").shape[0] > 100
    assert "measured bubble 53.3%" in line and "step7.png" in line and "step7.trace.json" in line
    assert in_milliseconds(by_hand().timeline).bubble_fraction == pytest.approx(by_hand().timeline.bubble_fraction)


def test_a_profile_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"could not write the trace .*--profile-pipeline"):
        write_profile(by_hand(), tmp_path / "file")
