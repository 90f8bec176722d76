"""A timeline of a real run: when each step of a schedule started and ended on every rank, and who waited for what.

`PipelineRecorder` gets from `run` what begins and ends. `gather` joins the ranks into the same `Timeline` that
`simulate` gives, so that it is drawn alike and its bubble compares with the simulated one. A step's time is without its
waiting for messages of the pipeline, and with everything else a stage does, such as collectives of tensor parallelism.

    recorder = PipelineRecorder(mesh.pp, Clock(device))
    run(schedule, actions, stages, micros, wire=wire, backward=backward, recorder=recorder)
    measured = recorder.gather()

Ranks count from a common barrier. On CUDA the times are those of the device.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from megatron3d.comm.collectives import barrier, gather_values
from megatron3d.comm.device import Clock, TimeMark
from megatron3d.comm.mesh import Axis
from megatron3d.pipeline.schedule import Op, Recv, Reduce, Schedule, Send, Step
from megatron3d.pipeline.simulate import Costs, TimedStep, Timeline, simulate

Recorded = Step | Send | Recv | Reduce


class TimedWait(NamedTuple):
    """What a rank did besides its steps, in seconds: it waited for a message, or started a reduction."""

    rank: int
    what: Send | Recv | Reduce
    start: float
    end: float


@dataclass(frozen=True)
class Measured:
    """One measured run of a schedule.

    Attributes:
        timeline: the steps in seconds from the start of the first one.
        waits: on the same scale, by rank and time.
    """

    timeline: Timeline
    waits: tuple[TimedWait, ...]

    @property
    def waiting_s(self) -> tuple[float, ...]:
        """Seconds that each rank waited for messages; idle time is this and what lies before and behind its steps."""
        waiting = [0.0] * self.timeline.schedule.num_ranks
        for wait in self.waits:
            waiting[wait.rank] += 0.0 if isinstance(wait.what, Reduce) else wait.end - wait.start
        return tuple(waiting)


class PipelineRecorder:
    """Marks the beginning and end of all that `run` does on this rank; recording it again forgets what it had."""

    def __init__(self, axis: Axis, clock: Clock) -> None:
        self._axis, self._clock = axis, clock
        self._schedule: Schedule | None = None
        self._zero: TimeMark = 0.0
        self._open: list[tuple[Recorded, TimeMark]] = []
        self._closed: list[tuple[Recorded, TimeMark, TimeMark]] = []

    def start(self, schedule: Schedule) -> None:
        """Agree on time zero with the other ranks of the pipeline: all of them must come here."""
        self._schedule = schedule
        self._open, self._closed = [], []
        barrier(self._axis)
        barrier(self._axis)  # Everybody is awake for this one, so all leave it within a fraction of a millisecond.
        self._clock.settle()
        self._zero = self._clock.mark()

    def begin(self, what: Recorded) -> None:
        """Something begins; a wait may be inside a step."""
        self._open.append((what, self._clock.mark()))

    def end(self) -> None:
        """What began last is over. A step that waited begins anew: nothing was computed before."""
        now = self._clock.mark()
        what, start = self._open.pop()
        self._closed.append((what, start, now))
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    def gather(self) -> Measured:
        """Put all ranks' times together, the same on every rank of the pipeline; all of them must come here.

        Raises:
            ValueError: nothing was recorded.
        """
        if self._schedule is None:
            raise ValueError(f"the recorder of pipeline rank {self._axis.rank} was not handed to a run")
        self._clock.settle()
        since = self._clock.seconds_between
        mine = [(what, since(self._zero, start), since(self._zero, end)) for what, start, end in self._closed]
        return measured_from(self._schedule, gather_values(mine, self._axis))


def measured_from(schedule: Schedule, by_rank: list[list[tuple[Recorded, float, float]]]) -> Measured:
    """The ranks' records, each with start and end in seconds from a common zero, as one timeline.

    Peak live activations are those of the schedule: they follow from the order of the steps and not from their times.
    """
    zero = min(start for row in by_rank for what, start, _ in row if isinstance(what, Step))
    steps: list[TimedStep] = []
    waits: list[TimedWait] = []
    busy = [0.0] * schedule.num_ranks
    for rank, row in enumerate(by_rank):
        for what, start, end in row:
            if isinstance(what, Step):
                steps.append(TimedStep(rank, what, start - zero, end - zero))
                busy[rank] += end - start
            else:
                waits.append(TimedWait(rank, what, start - zero, end - zero))
    steps.sort(key=lambda timed: (timed.end, timed.start))
    waits.sort(key=lambda wait: (wait.rank, wait.start))
    timeline = replace(simulate(schedule), steps=tuple(steps), span=steps[-1].end, busy=tuple(busy))
    return Measured(timeline, tuple(waits))


def measured_costs(timeline: Timeline) -> Costs:
    """What the steps took on average by kind, with a factor for each stage; messages are free.

    In a simulation these costs give the bubble that the order of the steps alone explains.
    """
    by_op: dict[Op, list[float]] = defaultdict(list)
    for timed in timeline.steps:
        by_op[timed.step.op].append(timed.end - timed.start)
    mean = {op: fmean(times) for op, times in by_op.items()}
    taken: dict[int, float] = defaultdict(float)
    usual: dict[int, float] = defaultdict(float)
    for timed in timeline.steps:
        taken[timed.step.stage] += timed.end - timed.start
        usual[timed.step.stage] += mean[timed.step.op]
    factors = tuple(taken[stage] / usual[stage] for stage in range(timeline.schedule.num_stages))
    names = {Op.F: "forward", Op.B: "backward", Op.I: "input_grad", Op.W: "weight_grad"}
    return replace(Costs(stage_factors=factors), **{names[op]: value for op, value in mean.items()})


def comparison_line(measured: Measured) -> str:
    """The measured bubble beside that of a simulation with the measured step times, in one line."""
    timeline = measured.timeline
    expected = simulate(timeline.schedule, measured_costs(timeline))
    waiting = sum(measured.waiting_s) / (timeline.span * timeline.schedule.num_ranks)
    return (
        f"{timeline.schedule.name}: measured bubble {timeline.bubble_fraction:.1%} of {timeline.span * 1e3:.1f} ms "
        f"(waiting for messages {waiting:.1%}); simulated with these step times and free messages "
        f"{expected.bubble_fraction:.1%} of {expected.span * 1e3:.1f} ms"
    )
