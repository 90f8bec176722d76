"""What a pipeline schedule is: one row of steps per pipeline rank, and the rules a row must keep.

A schedule says who computes what and in which order; it knows nothing of tensors, devices or processes.
`orders` writes schedules, `lower` adds the messages, `simulate` gives times, `draw` draws, `run` executes.

A *stage* is a contiguous part of the model, a *microbatch* (mb) a part of the batch. `stage_to_rank` places the
stages; nothing here assumes that stage and rank are the same number, so a rank may hold several stages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from megatron3d.errors import ScheduleError


class Op(StrEnum):
    """The work a stage does on one microbatch. B is I and W in one go; a (stage, mb) has either B, or I and W."""

    F = "F"
    """Forward."""
    B = "B"
    """Full backward: the gradient of the input and of the weights."""
    I = "I"  # noqa: E741  (the field's name for the input-gradient half)
    """Input-gradient half of the backward: what the stage before waits for."""
    W = "W"
    """Weight-gradient half of the backward: nobody waits for it, so it can fill bubbles."""


BACKWARD_OPS = (Op.B, Op.I, Op.W)

What = Literal["activation", "gradient"]


class Step(NamedTuple):
    """One computation: `op` of `stage` on microbatch `mb`."""

    op: Op
    stage: int
    mb: int

    def __str__(self) -> str:
        """The step as error messages and tables show it."""
        return f"{self.op.value}(stage {self.stage}, mb {self.mb})"


class Send(NamedTuple):
    """The output activation, or the input gradient, of `stage` leaves for pipeline rank `peer`."""

    what: What
    stage: int
    mb: int
    peer: int


class Recv(NamedTuple):
    """The input activation, or the output gradient, of `stage` arrives from pipeline rank `peer`."""

    what: What
    stage: int
    mb: int
    peer: int


class Exchange(NamedTuple):
    """Messages that are posted together; it is over when all of them have passed. Most hold a single one."""

    messages: tuple[Send | Recv, ...]


class Reduce(NamedTuple):
    """All weight gradients of `stage` are complete: their reduction over the other axes may start."""

    stage: int


Action = Step | Exchange | Reduce


@dataclass(frozen=True)
class Schedule:
    """Who computes what, in which order: `rows[rank]` is carried out from left to right."""

    name: str
    num_stages: int
    num_microbatches: int
    rows: tuple[tuple[Step, ...], ...]
    stage_to_rank: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """How many pipeline ranks the schedule is for."""
        return len(self.rows)

    def steps(self) -> Iterator[Step]:
        """All steps, row by row."""
        for row in self.rows:
            yield from row

    def has_backward(self) -> bool:
        """Whether this schedule trains; evaluation and generation have forwards only."""
        return any(step.op in BACKWARD_OPS for step in self.steps())


def needs(step: Step, num_stages: int, present: Collection[Step]) -> tuple[Step, ...]:
    """The steps that must be finished before `step` can start, wherever they run.

    `present` holds the steps of the schedule (a set: it is searched); it decides whether the gradient from the next
    stage comes out of a full backward B or of an input-gradient half I.
    """
    op, stage, mb = step
    if op is Op.F:
        return (Step(Op.F, stage - 1, mb),) if stage > 0 else ()
    if op is Op.W:
        return (Step(Op.I, stage, mb),)
    forward = Step(Op.F, stage, mb)
    if stage == num_stages - 1:
        return (forward,)
    split = Step(Op.I, stage + 1, mb)
    return (forward, split if split in present else Step(Op.B, stage + 1, mb))


def handover(step: Step, schedule: Schedule) -> tuple[int, int] | None:
    """The stage that uses what `step` hands over, and that stage's rank (maybe the same rank); None if nobody does.

    A forward hands its output activation to the next stage, B and I their input gradient to the one before.
    """
    if step.op is Op.W:
        return None
    user = step.stage + 1 if step.op is Op.F else step.stage - 1
    return (user, schedule.stage_to_rank[user]) if 0 <= user < schedule.num_stages else None


def check(schedule: Schedule) -> None:
    """Accept a schedule whose rows hold every step exactly once, on the right rank, in an order the row can keep.

    A schedule without any backward is complete with its forwards. Waiting in circles across ranks is found by
    `simulate` (and so by `lower`), which say who waits for what.

    Raises:
        ScheduleError: naming the schedule and the first step that is missing, doubled, misplaced or too early.
    """
    _check_placement(schedule)
    _check_complete(schedule)
    _check_rows_ordered(schedule)


def _check_placement(schedule: Schedule) -> None:
    """Sizes agree, and each step names an existing stage and microbatch on the rank that holds the stage."""
    if schedule.num_stages < 1 or schedule.num_microbatches < 1 or not schedule.rows:
        raise ScheduleError(
            f"schedule {schedule.name!r} has {schedule.num_ranks} ranks, {schedule.num_stages} stages and "
            f"{schedule.num_microbatches} microbatches; give at least one of each"
        )
    places = schedule.stage_to_rank
    if len(places) != schedule.num_stages or not all(0 <= rank < schedule.num_ranks for rank in places):
        raise ScheduleError(
            f"schedule {schedule.name!r}: stage_to_rank {places} does not place {schedule.num_stages} stages on ranks "
            f"0 to {schedule.num_ranks - 1}; give one rank per stage"
        )
    for rank, row in enumerate(schedule.rows):
        for step in row:
            if not (0 <= step.stage < schedule.num_stages and 0 <= step.mb < schedule.num_microbatches):
                raise ScheduleError(
                    f"schedule {schedule.name!r}: {step} on rank {rank} is outside of {schedule.num_stages} stages "
                    f"and {schedule.num_microbatches} microbatches; remove it"
                )
            if places[step.stage] != rank:
                raise ScheduleError(
                    f"schedule {schedule.name!r}: {step} is on rank {rank}, but stage {step.stage} lives on rank "
                    f"{places[step.stage]}; move it there"
                )


def _check_complete(schedule: Schedule) -> None:
    """Each forward once, each backward once: as B, or as I and W; or no backward at all."""
    present: set[Step] = set()
    for step in schedule.steps():
        if step in present:
            raise ScheduleError(f"schedule {schedule.name!r}: {step} stands there twice; keep one of them")
        present.add(step)
    trains = schedule.has_backward()
    for stage in range(schedule.num_stages):
        for mb in range(schedule.num_microbatches):
            ops = "".join(op.value for op in Op if Step(op, stage, mb) in present)
            allowed = ("FB", "FIW") if trains else ("F",)
            if ops not in allowed:
                raise ScheduleError(
                    f"schedule {schedule.name!r}: stage {stage}, mb {mb} has the steps {ops or 'none'!r}; "
                    f"it needs {' or '.join(allowed)}, each once"
                )


def _check_rows_ordered(schedule: Schedule) -> None:
    """Where a step and what it needs are on one rank, the needed one comes first."""
    present = set(schedule.steps())
    for rank, row in enumerate(schedule.rows):
        done: set[Step] = set()
        for step in row:
            for needed in needs(step, schedule.num_stages, present):
                if schedule.stage_to_rank[needed.stage] == rank and needed not in done:
                    raise ScheduleError(
                        f"schedule {schedule.name!r}: rank {rank} has {step} before {needed}, which it needs; swap them"
                    )
            done.add(step)
