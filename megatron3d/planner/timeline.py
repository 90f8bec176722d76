"""Timeline: the memory of one pipeline rank through all actions of a training step, besides its state.

The rank's row of the lowered schedule is walked from left to right with the memory that each step takes and leaves.
Steps of one stage are alike but for the reductions that are on their way when they begin, so few are worked out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron3d.pipeline.schedule import Action, Exchange, Op, Recv, Schedule, Send, Step
from megatron3d.planner.replay import MemoryUse, StepMemory, replay_backward, replay_forward
from megatron3d.planner.stage_records import StageSteps
from megatron3d.planner.transient import InFlight, TransientForecast, TransientPlan

_Done = tuple[StepMemory, InFlight]


@dataclass(frozen=True)
class RankStages:
    """The stages of a rank.

    Attributes:
        record_of: gives the record of a stage, or that of its split backward.
        transient: what each stage gathers and reduces.
        message: bytes of one message between stages.
        sends_linger: whether a rank cannot tell when a message has left, as with gloo, and keeps some for longer.
    """

    record_of: Callable[[int, bool], StageSteps]
    transient: Mapping[int, TransientPlan]
    message: int
    sends_linger: bool


def peak_use(stages: RankStages, schedule: Schedule, actions: Sequence[Action]) -> MemoryUse:
    """The moment of a training step at which a rank holds most besides its state.

    Args:
        stages: of the rank.
        schedule: the schedule that was lowered.
        actions: the rank's row of it.
    """
    walk = _RowWalk(stages, schedule)
    for action in actions:
        walk.carry_out(action)
    return walk.peak


@dataclass
class _RowWalk:
    stages: RankStages
    schedule: Schedule
    now: MemoryUse = field(default_factory=MemoryUse)
    peak: MemoryUse = field(default_factory=MemoryUse)
    in_flight: InFlight = field(default_factory=InFlight)
    known: dict[tuple[Op, int, bool, InFlight], _Done] = field(default_factory=dict)
    lingering: Counter[int] = field(default_factory=Counter)
    last_steps: frozenset[Step] = frozenset()

    def __post_init__(self) -> None:
        """Find the last step of each stage that brings gradients of weights."""
        last = {step.stage: step for step in self.schedule.steps() if step.op in (Op.B, Op.W)}
        self.last_steps = frozenset(last.values())

    def carry_out(self, action: Action) -> None:
        if isinstance(action, Exchange):
            for message in action.messages:
                self._message(message)
        elif isinstance(action, Step):
            self._step(action)

    def _message(self, message: Send | Recv) -> None:
        """A received tensor is new; a sent activation is kept by its stage anyhow, and a sent gradient until it left.

        At most as many gradients as there are stages wait for word that they have left.
        """
        if isinstance(message, Recv):
            self._count(1)
        elif message.what == "gradient":
            keeps = self.schedule.num_stages if self.stages.sends_linger else 0
            if self.lingering[message.stage] > keeps:
                self._count(-1)
            else:
                self.lingering[message.stage] += 1

    def _step(self, step: Step) -> None:
        memory, in_flight = self._memory_of(step)
        self._look(self.now + memory.peak)
        self.now, self.in_flight = self.now + memory.left, in_flight
        if step.op in (Op.B, Op.I):
            is_first, is_last = step.stage == 0, step.stage == self.schedule.num_stages - 1
            comes_by_wire = not is_first and self._rank(step.stage - 1) != self._rank(step.stage)
            # The gradient of the input is new; that of the output and, if it came as a message, the input go.
            self._count((not is_first) - (not is_last) - comes_by_wire)
        self._look(self.now)

    def _rank(self, stage: int) -> int:
        return self.schedule.stage_to_rank[stage]

    def _count(self, messages: int) -> None:
        self.now = self.now + MemoryUse(messages=messages * self.stages.message)
        self._look(self.now)

    def _look(self, now: MemoryUse) -> None:
        if now.total > self.peak.total:
            self.peak = now

    def _memory_of(self, step: Step) -> _Done:
        in_flight = InFlight() if step.op is Op.F else self.in_flight
        is_last = step in self.last_steps
        key = (step.op, step.stage, is_last, in_flight)
        if key not in self.known:
            self.known[key] = self._work_out(step, in_flight, is_last=is_last)
        memory, after = self.known[key]
        return memory, self.in_flight if step.op is Op.F else after

    def _work_out(self, step: Step, in_flight: InFlight, *, is_last: bool) -> _Done:
        """One step on its own, with what comes before it in its stage."""
        transient = TransientForecast(self.stages.transient[step.stage], in_flight)
        record = self.stages.record_of(step.stage, step.op in (Op.I, Op.W))
        memory = replay_forward(record.forward, transient)
        if step.op is not Op.F:
            memory = replay_backward(record.backward, transient, is_last=is_last or step.op is Op.W)
        if step.op is Op.W:
            memory = replay_backward(record.weights, transient, is_last=is_last)
        return memory, transient.in_flight
