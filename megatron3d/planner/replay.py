"""How much memory one step of a stage takes and leaves: its record, replayed with what ZeRO gathers and reduces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron3d.planner.recording import Event, Kind
from megatron3d.planner.transient import TransientForecast


@dataclass(frozen=True)
class MemoryUse:
    """What is allocated at one moment besides the state, in bytes.

    Attributes:
        activations: tensors of forwards, kept for their backwards or in use.
        work: gradients of activations, and temporaries of operations.
        transient: gathered weights and whole-unit gradients under ZeRO.
        messages: tensors that arrive from or leave for other stages.
    """

    activations: int = 0
    work: int = 0
    transient: int = 0
    messages: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.work + self.transient + self.messages

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(
            self.activations + other.activations,
            self.work + other.work,
            self.transient + other.transient,
            self.messages + other.messages,
        )


@dataclass(frozen=True)
class StepMemory:
    """One step: its highest moment and what it leaves, both beside what was there before it."""

    peak: MemoryUse
    left: MemoryUse


@dataclass(frozen=True, slots=True)
class Interval:
    """What memory does between two marks of a record: its highest moment and what is left, beside what was before."""

    peak: MemoryUse
    left: MemoryUse


Steps = tuple[Event | Interval, ...]


def condensed(events: Sequence[Event]) -> Steps:
    """A record with the allocations between two marks as one interval, which replays a deep stage much faster."""
    steps: list[Event | Interval] = []
    activations, work, peak = 0, 0, MemoryUse()

    def end() -> None:
        if peak.total or activations or work:
            steps.append(Interval(peak, MemoryUse(activations, work)))

    for event in events:
        if event.kind not in (Kind.ACTIVATION, Kind.WORK, Kind.SCRATCH):
            end()
            steps.append(event)
            activations, work, peak = 0, 0, MemoryUse()
            continue
        activations += event.size_bytes if event.kind is Kind.ACTIVATION else 0
        work += event.size_bytes if event.kind is Kind.WORK else 0
        scratch = event.size_bytes if event.kind is Kind.SCRATCH else 0
        if activations + work + scratch > peak.total:
            peak = MemoryUse(activations, work + scratch)
    end()
    return tuple(steps)


def left_of(steps: Sequence[Event | Interval]) -> MemoryUse:
    """What is left at the end of all that was allocated."""
    intervals = [one.left for one in steps if isinstance(one, Interval)]
    return MemoryUse(sum(one.activations for one in intervals), sum(one.work for one in intervals))


def replay_forward(steps: Sequence[Event | Interval], transient: TransientForecast) -> StepMemory:
    """A forward, whose output somebody holds until the backward."""
    return _replay(steps, transient)


def replay_backward(steps: Sequence[Event | Interval], transient: TransientForecast, *, is_last: bool) -> StepMemory:
    """A backward, or one half of a split one; `is_last` says that no more gradients of weights will come in this
    training step."""
    marks = [one for one in steps if isinstance(one, Event)]
    transient.begin_backward(Counter(one.name for one in marks if one.kind is Kind.CONTRIBUTE), is_last=is_last)
    before = transient.held_bytes
    done = _replay(steps, transient)
    transient.end_backward()
    last = MemoryUse(done.left.activations, done.left.work, transient.take_highest() - before)
    left = MemoryUse(done.left.activations, done.left.work, transient.held_bytes - before)
    return StepMemory(max(done.peak, last, key=lambda one: one.total), left)


def _replay(steps: Sequence[Event | Interval], transient: TransientForecast) -> StepMemory:
    before = transient.held_bytes
    now, peak = MemoryUse(), MemoryUse()
    for step in steps:
        highest = now
        if isinstance(step, Interval):
            highest, now = now + step.peak, now + step.left
        else:
            _apply_to_transient(step, transient)
        highest += MemoryUse(transient=transient.take_highest() - before)
        if highest.total > peak.total:
            peak = highest
    return StepMemory(peak, now + MemoryUse(transient=transient.held_bytes - before))


def _apply_to_transient(event: Event, transient: TransientForecast) -> None:
    """Apply an event to the transient buffers."""
    if event.kind is Kind.ENTER:
        transient.enter(event.name)
    elif event.kind is Kind.LEAVE:
        transient.leave(event.name)
    elif event.kind is Kind.ENTER_BACKWARD:
        transient.enter_backward(event.name)
    elif event.kind is Kind.LEAVE_BACKWARD:
        transient.leave_backward(event.name)
    elif event.kind is Kind.GATHER_BLOCK:
        transient.gather_block(event.name)
    elif event.kind is Kind.ARRIVE:
        transient.arrive(event.name)
    elif event.kind is Kind.CONTRIBUTE:
        transient.contribute(event.name, 1)
