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
    """By rank: the most (stage, microbatch) whose activations are held at once, large and small stages alike."""
    peak_in_ranks: tuple[float, ...]
    """The same in units of one microbatch on a whole rank, so that orders with more stages per rank compare."""

    @property
    def idle(self) -> tuple[float, ...]:
        """Time each rank has nothing to do between the first start and the last end of all ranks."""
        return tuple(self.span - busy for busy in self.busy)

    @property
    def idle_inside(self) -> tuple[float, ...]:
        """Time each rank has nothing to do between its own first start and its own last end.

        This is the bubble of papers whose ranks do not wait for each other at the end of a training step.
        """
        first, last = [self.span] * len(self.busy), [0.0] * len(self.busy)
        for rank, _, start, end in self.steps:
            first[rank], last[rank] = min(first[rank], start), max(last[rank], end)
        return tuple(end - start - busy for start, end, busy in zip(first, last, self.busy))

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
    peaks, in_ranks = peak_live(schedule), peak_live_in_ranks(schedule, costs.stage_factors)
    return Timeline(schedule, tuple(steps), steps[-1].end, tuple(busy), peaks, in_ranks)


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
            at = next_index[rank]
            while at < len(row) and all(needed in done for needed in needs(row[at], schedule.num_stages, present)):
                done[row[at]] = None
                at += 1
            next_index[rank] = at
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


def peak_live(schedule: Schedule) -> tuple[int, ...]:
    """By rank: the most (stage, mb) whose activations are held at once, from F to the end of B or W.

    Without backwards, activations last only as long as their forward. An input-gradient half I does not release: the
    weight-gradient half still reads the stage's inputs.
    """
    return tuple(round(peak) for peak in _peaks(schedule, (1.0,) * schedule.num_stages))


def peak_live_in_ranks(schedule: Schedule, stage_factors: tuple[float, ...] | None = None) -> tuple[float, ...]:
    """The same, counting each stage as its share of the model times the number of ranks.

    Stages have equal shares, or shares in proportion to `stage_factors`. With V equal stages per rank, each
    (stage, mb) counts 1/V, so that 1F1B's first rank has num_ranks whatever the number of stages.
    """
    factors = stage_factors or (1.0,) * schedule.num_stages
    unit = sum(factors) / schedule.num_ranks
    return tuple(peak / unit for peak in _peaks(schedule, factors))


def _peaks(schedule: Schedule, weights: tuple[float, ...]) -> list[float]:
    """The largest sum of weights of live (stage, mb), by rank."""
    trains = schedule.has_backward()
    peaks = []
    for row in schedule.rows:
        live = peak = 0.0
        for op, stage, _ in row:
            live += weights[stage] * (op is Op.F)
            peak = max(peak, live)
            live -= weights[stage] * (not trains or op in (Op.B, Op.W))
        peaks.append(peak)
    return peaks


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
