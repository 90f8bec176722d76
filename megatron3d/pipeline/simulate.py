"""When each step of a schedule would run, given what steps and links cost; or who waits for whom if it never can.

The model is the usual one: a rank carries out its row from left to right, a step starts as soon as the rank is free
and what it needs has arrived, sends cost the sender no compute time, and messages over one directed link follow each
other. Nothing is measured here: costs come in, times go out, in whatever unit the costs have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.schedule import Op, Schedule, Step, check, handover, needs


@dataclass(frozen=True)
class Costs:
    """What one microbatch costs per stage, and what a message costs between ranks; one time unit throughout.

    `stage_factors[s]` multiplies the compute of stage s, for stages of different depth. A message of `message_bytes`
    holds its directed link for message_bytes / link_bandwidth and arrives `link_latency` later; bandwidth is in bytes
    per time unit. A hand-over between stages of one rank is free.
    """

    forward: float = 1.0
    backward: float = 2.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    stage_factors: tuple[float, ...] | None = None
    link_latency: float = 0.0
    link_bandwidth: float = float("inf")
    message_bytes: float = 0.0

    def of(self, step: Step) -> float:
        """How long `step` takes."""
        times = {Op.F: self.forward, Op.B: self.backward, Op.I: self.input_grad, Op.W: self.weight_grad}
        return times[step.op] * (self.stage_factors[step.stage] if self.stage_factors else 1.0)


class TimedStep(NamedTuple):
    """One step with its place and times, in the unit of the costs."""

    rank: int
    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule in time. `steps` is sorted by end, and each step stands behind everything it needs."""

    schedule: Schedule
    steps: tuple[TimedStep, ...]
    span: float
    busy: tuple[float, ...]
    peak_live_activations: tuple[int, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Time each rank has nothing to do between the first start and the last end of all ranks."""
        return tuple(self.span - busy for busy in self.busy)

    @property
    def bubble_fraction(self) -> float:
        """Idle time of all ranks over all time of all ranks: 0 is a full pipeline."""
        return sum(self.idle) / (self.span * len(self.busy))


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Carry out the schedule on paper; without costs, a backward takes twice a forward and messages are free.

    Raises:
        ScheduleError: if the schedule is incomplete or a cost unusable, or if ranks would wait in a circle; the
            sentence says who for what.
    """
    costs = costs or Costs()
    check(schedule)
    _check_costs(costs, schedule)
    steps = sorted(_times(schedule, costs), key=lambda timed: (timed.end, timed.start, _tie(timed.step)))
    busy = [0.0] * schedule.num_ranks
    for timed in steps:
        busy[timed.rank] += timed.end - timed.start
    peaks = tuple(_peak_live(row, schedule.has_backward()) for row in schedule.rows)
    return Timeline(schedule, tuple(steps), steps[-1].end, tuple(busy), peaks)


def _tie(step: Step) -> tuple[int, int]:
    """Order of steps that end together: gradients first, and each kind upstream first.

    `lower` takes message order from it: upstream first means that a rank's next message can be awaited while the
    rank still computes, instead of behind what it is about to send.
    """
    return (1, step.stage) if step.op is Op.F else (0, -step.stage)


def _times(schedule: Schedule, costs: Costs) -> list[TimedStep]:
    """Start and end of every step, in an order in which each stands behind what it needs."""
    present = set(schedule.steps())
    wire_time = costs.message_bytes / costs.link_bandwidth
    available: dict[tuple[Step, int], float] = {}  # (step, rank): when its result is there
    link_free: dict[tuple[int, int], float] = defaultdict(float)
    rank_free = [0.0] * schedule.num_ranks
    timed_steps = []
    for step in _dependency_order(schedule, present):
        rank = schedule.stage_to_rank[step.stage]
        ready = [available[needed, rank] for needed in needs(step, schedule.num_stages, present)]
        start = max([rank_free[rank], *ready])
        end = start + costs.of(step)
        timed_steps.append(TimedStep(rank, step, start, end))
        rank_free[rank] = available[step, rank] = end
        _, peer = handover(step, schedule) or (None, rank)
        if peer != rank:
            link_free[rank, peer] = max(link_free[rank, peer], end) + wire_time
            available[step, peer] = link_free[rank, peer] + costs.link_latency
    return timed_steps


def _dependency_order(schedule: Schedule, present: set[Step]) -> list[Step]:
    """All steps in an order that keeps the rows and the needs: each rank in turn goes as far as it can."""
    next_index = [0] * schedule.num_ranks
    done: dict[Step, None] = {}  # a set that keeps its order
    while len(done) < len(present):
        before = len(done)
        for rank, row in enumerate(schedule.rows):
            for step in row[next_index[rank] :]:
                if not all(needed in done for needed in needs(step, schedule.num_stages, present)):
                    break
                done[step] = None
                next_index[rank] += 1
        if len(done) == before:
            raise ScheduleError(_who_waits(schedule, next_index, present, done))
    return list(done)


def _who_waits(schedule: Schedule, next_index: list[int], present: set[Step], done: Collection[Step]) -> str:
    """Follow the waiting from the first stuck rank until it comes back to a rank, and tell that circle in words."""
    rank = next(r for r, row in enumerate(schedule.rows) if next_index[r] < len(row))
    waits: dict[int, str] = {}
    while rank not in waits:
        step = schedule.rows[rank][next_index[rank]]
        missing = next(needed for needed in needs(step, schedule.num_stages, present) if needed not in done)
        holder = schedule.stage_to_rank[missing.stage]
        waits[rank] = f"rank {rank} waits before {step} for {missing} of rank {holder}"
        rank = holder
    circle = list(waits.values())[list(waits).index(rank) :]
    return f"schedule {schedule.name!r} deadlocks: {', '.join(circle)}; change the order of one of these rows"


def _peak_live(row: tuple[Step, ...], trains: bool) -> int:
    """Most (stage, mb) whose activations are held at once: from F to the end of B or W (of F, without backward).

    An input-gradient half does not release: the weight-gradient half still reads the stage's inputs.
    """
    if not trains:
        return min(len(row), 1)
    live = peak = 0
    for step in row:
        live += step.op is Op.F
        peak = max(peak, live)
        live -= step.op in (Op.B, Op.W)
    return peak


def _check_costs(costs: Costs, schedule: Schedule) -> None:
    """Refuse costs that would turn time backwards or do not fit the schedule."""
    factors = costs.stage_factors or (1.0,) * schedule.num_stages
    if len(factors) != schedule.num_stages:
        raise ScheduleError(
            f"{len(factors)} stage factors {factors} for the {schedule.num_stages} stages of schedule "
            f"{schedule.name!r}; give one per stage"
        )
    times = (costs.forward, costs.backward, costs.input_grad, costs.weight_grad, costs.link_bandwidth, *factors)
    if not all(time > 0 for time in times) or costs.link_latency < 0 or costs.message_bytes < 0:
        raise ScheduleError(
            f"costs of a schedule must be positive (latency and message size may be 0), but they are {costs}"
        )
