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
from megatron3d.comm.p2p import start_receive, start_send
from megatron3d.params.grads import GradSink
from megatron3d.pipeline.schedule import Action, Op, Recv, Reduce, Schedule, Send, Step

Key = tuple[int, int]  # (stage, micro-batch)


class StageForward(Protocol):
    """What the interpreter asks of a stage."""

    def __call__(self, x_SBH: Tensor | None, micro: Any) -> Tensor:
        """Hidden in (None on the first stage), hidden out (on the last stage the summed loss, or logits)."""
        ...


@dataclass(frozen=True)
class Wire:
    """What travels between stages: hidden tensors of one known shape, over the pipeline axis."""

    axis: Axis
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """A buffer for one message."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Backward:
    """What a training schedule needs besides the stages.

    Attributes:
        loss_gradient: gradient of the final objective with respect to each summed loss, a scalar tensor.
        sink: takes weight gradients; asked to put them aside in input-gradient steps.
        reduce: called with a stage once its weight gradients are complete.
    """

    loss_gradient: Tensor
    sink: GradSink
    reduce: Callable[[int], None]


def run(
    schedule: Schedule,
    actions: Sequence[Action],
    stages: Mapping[int, StageForward],
    micros: Sequence[Any],
    *,
    wire: Wire,
    backward: Backward | None = None,
) -> list[Tensor]:
    """Carry out this rank's actions and return the last stage's outputs in micro-batch order (empty elsewhere).

    Args:
        schedule: the schedule that was lowered.
        actions: this rank's row of `lower(schedule)`.
        stages: this rank's stages by number.
        micros: one value for each micro-batch, handed to the stages.
        wire: shape, dtype and axis of the messages.
        backward: None runs forwards alone, without building a graph.

    Raises:
        ValueError: the number of micro-batches is not the schedule's.
    """
    if len(micros) != schedule.num_microbatches:
        raise ValueError(f"{len(micros)} micro-batches for a schedule of {schedule.num_microbatches}")
    interpreter = _Interpreter(schedule, stages, micros, wire, backward)
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
    inputs: dict[Key, Tensor | None] = field(default_factory=dict)
    outputs: dict[Key, Tensor] = field(default_factory=dict)
    output_grads: dict[Key, Tensor] = field(default_factory=dict)
    arriving: dict[tuple[str, int, int], Pending] = field(default_factory=dict)
    leaving: dict[tuple[str, int, int], Pending] = field(default_factory=dict)
    weight_work: dict[Key, list[Callable[[], None]]] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)

    def carry_out(self, action: Action) -> None:
        if isinstance(action, Step):
            {Op.F: self._forward, Op.B: self._backward, Op.I: self._input_gradient, Op.W: self._weight_gradient}[
                action.op
            ](action.stage, action.mb)
        elif isinstance(action, Send):
            self._send(action)
        elif isinstance(action, Recv):
            tag = self._tag(action.what, action.stage, action.mb)
            pending = start_receive(self.wire.empty(), self.wire.axis, peer=action.peer, tag=tag)
            self.arriving[action.what, action.stage, action.mb] = pending
        elif isinstance(action, Reduce) and self.backward is not None:
            self.backward.reduce(action.stage)

    def finish(self) -> list[Tensor]:
        for pending in self.leaving.values():
            pending.wait()
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
            x = self.arriving.pop(("activation", stage, mb)).wait()
        else:  # the stage before is on this rank
            before = (stage - 1, mb)
            x = (self.outputs[before] if self.backward is not None else self.outputs.pop(before)).detach()
        return x.requires_grad_(self.backward is not None)

    def _backward(self, stage: int, mb: int) -> None:
        grad = self._output_gradient(stage, mb)
        y = self.outputs.pop((stage, mb))
        sent = self.leaving.pop(("activation", stage, mb), None)
        if sent is not None:
            sent.wait()  # its gradient has come back, so it arrived long ago
        torch.autograd.backward(y, grad)
        x = self.inputs.pop((stage, mb))
        if x is not None:
            assert x.grad is not None, f"stage {stage} gave no input gradient for micro-batch {mb}"
            self.output_grads[stage - 1, mb] = x.grad

    def _output_gradient(self, stage: int, mb: int) -> Tensor:
        assert self.backward is not None, "a backward step in a schedule that is run without gradients"
        if stage == self.schedule.num_stages - 1:
            return self.backward.loss_gradient
        if ("gradient", stage, mb) in self.arriving:
            return self.arriving.pop(("gradient", stage, mb)).wait()
        return self.output_grads.pop((stage, mb))

    def _input_gradient(self, stage: int, mb: int) -> None:
        assert self.backward is not None, "an input-gradient step in a schedule that is run without gradients"
        with self.backward.sink.defer() as work:
            self._backward(stage, mb)
        self.weight_work[stage, mb] = work

    def _weight_gradient(self, stage: int, mb: int) -> None:
        for work in self.weight_work.pop((stage, mb)):
            work()

    def _send(self, send: Send) -> None:
        self._release_sent(send)
        if send.what == "activation":
            kept = self.backward is not None
            x = self.outputs[send.stage, send.mb] if kept else self.outputs.pop((send.stage, send.mb))
            receiving_stage = send.stage + 1
        else:
            x = self.output_grads.pop((send.stage - 1, send.mb))
            receiving_stage = send.stage - 1
        tag = self._tag(send.what, receiving_stage, send.mb)
        x = x.detach().to(self.wire.dtype).contiguous()
        self.leaving[send.what, send.stage, send.mb] = start_send(x, self.wire.axis, peer=send.peer, tag=tag)

    def _release_sent(self, coming: Send) -> None:
        """Let go of messages that have arrived, so that a rank does not hold every tensor it ever sent.

        Gloo cannot tell what has arrived. But the messages of a pair of ranks arrive in order, and a receive is posted
        before its data is produced, so the older of two messages to the same rank may be waited for.
        """
        self.leaving = {key: pending for key, pending in self.leaving.items() if not pending.is_done()}
        same = [key for key in self.leaving if key[:2] == (coming.what, coming.stage)]
        for key in same[: max(0, len(same) - self.schedule.num_stages)]:
            self.leaving.pop(key).wait()

    def _tag(self, what: str, receiving_stage: int, mb: int) -> int:
        """A number that no other message of this schedule has (gloo matches messages by it)."""
        kind = 0 if what == "activation" else 1
        return (kind * self.schedule.num_stages + receiving_stage) * self.schedule.num_microbatches + mb
