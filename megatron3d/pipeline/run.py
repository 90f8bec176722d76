"""The interpreter: carries out one rank's row of a lowered schedule. The only loop over micro-batches in the project.

One process is a pipeline of one stage, evaluation and generation are schedules without backwards; all of them come
through here. The interpreter knows tensors and messages and nothing of layouts, models, ZeRO or recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron3d.comm.collectives import Pending
from megatron3d.comm.mesh import Axis
from megatron3d.comm.p2p import Message, start_exchange
from megatron3d.params.grads import GradSink
from megatron3d.pipeline.schedule import Action, Exchange, Op, Recv, Reduce, Schedule, Send, Step, What

Key = tuple[int, int]  # (stage, micro-batch)


class StageForward(Protocol):
    """What the interpreter asks of a stage."""

    def __call__(self, x_SBH: Tensor | None, micro: Any) -> Tensor:
        """Hidden in (None on the first stage), hidden out; on the last stage a scalar to start the backward from, or
        logits."""
        ...


class Recorder(Protocol):
    """What the interpreter reports of its work, for a timeline of a real run; see `measured`."""

    def start(self, schedule: Schedule) -> None:
        """The first action comes next."""
        ...

    def begin(self, what: Step | Send | Recv | Reduce) -> None:
        """A step or the start of a reduction begins; or, with a message, waiting for it, maybe inside a step."""
        ...

    def end(self) -> None:
        """What began last is over."""
        ...


class _NoRecorder:
    """Takes no notice."""

    def start(self, schedule: Schedule) -> None:
        pass

    def begin(self, what: Step | Send | Recv | Reduce) -> None:
        pass

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Wire:
    """What travels between stages: hidden tensors of shapes that both ends know, one for each micro-batch, over the
    pipeline axis."""

    axis: Axis
    shapes: Sequence[tuple[int, int, int]]
    dtype: torch.dtype
    device: torch.device

    def empty(self, mb: int) -> Tensor:
        """A buffer for one message of a micro-batch."""
        return torch.empty(self.shapes[mb], dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Backward:
    """What a training schedule needs besides the stages.

    Attributes:
        sink: takes weight gradients; asked to defer them in input-gradient steps.
        reduce: called with a stage once its weight gradients are complete.
        before: called with a stage before each of its backwards, and before each half where they are split.
        after: called with the stage when that is over.
    """

    sink: GradSink
    reduce: Callable[[int], None]
    before: Callable[[int], None] = lambda stage: None
    after: Callable[[int], None] = lambda stage: None


def run(
    schedule: Schedule,
    actions: Sequence[Action],
    stages: Mapping[int, StageForward],
    micros: Sequence[Any],
    *,
    wire: Wire,
    backward: Backward | None = None,
    recorder: Recorder | None = None,
) -> list[Tensor]:
    """Carry out this rank's actions and return the last stage's outputs in micro-batch order (empty elsewhere).

    Args:
        schedule: the schedule that was lowered.
        actions: this rank's row of `lower(schedule)`.
        stages: this rank's stages by number.
        micros: one value for each micro-batch, handed to the stages.
        wire: shapes, dtype and axis of the messages.
        backward: None runs forwards alone, without building a graph.
        recorder: called when each step and each wait for a message begins and ends.

    Raises:
        ValueError: the number of micro-batches, or of shapes of their messages, is not the schedule's.
    """
    if len(micros) != schedule.num_microbatches:
        raise ValueError(f"{len(micros)} micro-batches for a schedule of {schedule.num_microbatches}")
    if len(wire.shapes) != len(micros):
        raise ValueError(f"{len(wire.shapes)} shapes of messages for {len(micros)} micro-batches")
    interpreter = _Interpreter(schedule, stages, micros, wire, backward, recorder or _NoRecorder())
    interpreter.recorder.start(schedule)
    with torch.set_grad_enabled(backward is not None):
        for action in actions:
            interpreter.carry_out(action)
    return interpreter.finish()


@dataclass
class _Interpreter:
    schedule: Schedule
    stages: Mapping[int, StageForward]
    micros: Sequence[Any]
    wire: Wire
    backward: Backward | None
    recorder: Recorder
    inputs: dict[Key, Tensor | None] = field(default_factory=dict)
    outputs: dict[Key, Tensor] = field(default_factory=dict)
    output_grads: dict[Key, Tensor] = field(default_factory=dict)
    arriving: dict[tuple[What, int, int], tuple[Recv, Pending]] = field(default_factory=dict)
    leaving: dict[Send, Pending] = field(default_factory=dict)
    weight_work: dict[Key, list[Callable[[], None]]] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)

    def carry_out(self, action: Action) -> None:
        if isinstance(action, Exchange):
            self._exchange(action)
            return
        self.recorder.begin(action)
        if isinstance(action, Step):
            backward = None if action.op is Op.F else self.backward
            if backward is not None:
                backward.before(action.stage)
            {Op.F: self._forward, Op.B: self._backward, Op.I: self._input_gradient, Op.W: self._weight_gradient}[
                action.op
            ](action.stage, action.mb)
            if backward is not None:
                backward.after(action.stage)
        elif self.backward is not None:
            self.backward.reduce(action.stage)
        self.recorder.end()

    def finish(self) -> list[Tensor]:
        for send in [*self.leaving]:
            self._wait_until_sent(send)
        left = [*self.arriving, *self.weight_work, *self.output_grads] + (
            [] if self.backward is None else [*self.outputs]
        )
        assert not left, f"schedule {self.schedule.name} left work undone: {left}"
        return [self.results[mb] for mb in sorted(self.results)]

    def _forward(self, stage: int, mb: int) -> None:
        x = self._input(stage, mb)
        y = self.stages[stage](x, self.micros[mb])
        if stage == self.schedule.num_stages - 1:
            self.results[mb] = y.detach()
        if self.backward is not None:
            self.inputs[stage, mb] = x
        if self.backward is not None or stage < self.schedule.num_stages - 1:
            self.outputs[stage, mb] = y

    def _input(self, stage: int, mb: int) -> Tensor | None:
        if stage == 0:
            return None
        if ("activation", stage, mb) in self.arriving:
            x = self._arrived("activation", stage, mb)
        else:  # the stage before is on this rank
            before = (stage - 1, mb)
            x = (self.outputs[before] if self.backward is not None else self.outputs.pop(before)).detach()
        return x.requires_grad_(self.backward is not None)

    def _backward(self, stage: int, mb: int) -> None:
        grad = self._output_gradient(stage, mb)
        y = self.outputs.pop((stage, mb))
        sent = next((send for send in self.leaving if send[:3] == ("activation", stage, mb)), None)
        if sent is not None:
            self._wait_until_sent(sent)  # its gradient has come back, so it arrived long ago
        if y.requires_grad:  # not that of a first stage all of whose parameters are frozen
            torch.autograd.backward(y, grad)
        x = self.inputs.pop((stage, mb))
        if x is not None:
            assert x.grad is not None, f"stage {stage} gave no input gradient for micro-batch {mb}"
            self.output_grads[stage - 1, mb] = x.grad

    def _output_gradient(self, stage: int, mb: int) -> Tensor | None:
        assert self.backward is not None, "a backward step in a schedule that is run without gradients"
        if stage == self.schedule.num_stages - 1:
            return None  # 1, of a scalar
        if ("gradient", stage, mb) in self.arriving:
            return self._arrived("gradient", stage, mb)
        return self.output_grads.pop((stage, mb))

    def _input_gradient(self, stage: int, mb: int) -> None:
        assert self.backward is not None, "an input-gradient step in a schedule that is run without gradients"
        with self.backward.sink.defer() as work:
            self._backward(stage, mb)
        self.weight_work[stage, mb] = work

    def _weight_gradient(self, stage: int, mb: int) -> None:
        for work in self.weight_work.pop((stage, mb)):
            work()

    def _exchange(self, exchange: Exchange) -> None:
        ends = []
        for message in exchange.messages:
            if isinstance(message, Send):
                self._release_sent(message)
                user = message.stage + (1 if message.what == "activation" else -1)
                tensor = self._outgoing(message)
            else:
                user, tensor = message.stage, self.wire.empty(message.mb)
            ends.append(Message(tensor, isinstance(message, Send), message.peer, self._tag(message, user)))
        for message, pending in zip(exchange.messages, start_exchange(ends, self.wire.axis)):
            if isinstance(message, Send):
                self.leaving[message] = pending
            else:
                self.arriving[message.what, message.stage, message.mb] = (message, pending)

    def _outgoing(self, send: Send) -> Tensor:
        if send.what == "activation":
            kept = self.backward is not None
            x = self.outputs[send.stage, send.mb] if kept else self.outputs.pop((send.stage, send.mb))
        else:
            x = self.output_grads.pop((send.stage - 1, send.mb))
        return x.detach().to(self.wire.dtype).contiguous()

    def _arrived(self, what: What, stage: int, mb: int) -> Tensor:
        """The message that a step needs, waited for."""
        recv, pending = self.arriving.pop((what, stage, mb))
        self.recorder.begin(recv)
        tensor = pending.wait()
        self.recorder.end()
        return tensor

    def _wait_until_sent(self, send: Send) -> None:
        self.recorder.begin(send)
        self.leaving.pop(send).wait()
        self.recorder.end()

    def _release_sent(self, coming: Send) -> None:
        """Let go of messages that have arrived, so that a rank does not hold every tensor it ever sent.

        Gloo cannot tell what has arrived. But an exchange needs nothing but earlier ones to pass, so those from before
        the coming one may be waited for; a few are left, so that a slow receiver does not hold up this rank.
        """
        self.leaving = {send: pending for send, pending in self.leaving.items() if not pending.is_done()}
        same = [send for send in self.leaving if (send.what, send.stage) == (coming.what, coming.stage)]
        for send in same[: max(0, len(same) - self.schedule.num_stages)]:
            self._wait_until_sent(send)

    def _tag(self, message: Send | Recv, user_stage: int) -> int:
        """A number that no other message of this schedule has (gloo matches messages by it)."""
        kind = 0 if message.what == "activation" else 1
        return (kind * self.schedule.num_stages + user_stage) * self.schedule.num_microbatches + message.mb
