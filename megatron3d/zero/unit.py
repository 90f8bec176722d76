"""FlatUnit: the parameters of one block in flat buffers, from initialisation to checkpoint.

A unit owns its weights (in the dtype layers compute in), gradient buffer, and the fp32 master weights of the part
that this rank updates; the modules' parameters are views into the weights. Communication of gradients and weights is
written as start/finish pairs, and all of it is in this file.

The gradient of a unit is complete after every micro-batch has contributed; then, in this order:
partial sums over the tensor axis, the sum over the holders of a tied table, the sum over the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron3d.comm.collectives import (
    Pending,
    all_reduce,
    start_all_gather_into,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron3d.comm.mesh import Axis, Mesh
from megatron3d.params.boxes import ShardView
from megatron3d.params.grads import GradSink
from megatron3d.params.init import initial_shard
from megatron3d.params.module import Declared
from megatron3d.zero.flat import Slot, Span, flat_layout
from megatron3d.zero.policy import Policy

# Elements that one norm adds up in fp32. On the CPU torch adds squares one after another: over 10^8 elements the sum
# comes out 4 % too small and depends on the layout, over this many it is exact to 1e-6.
NORM_CHUNK = 1 << 16


@dataclass(frozen=True)
class UnitOptions:
    """What all units of a rank share.

    Attributes:
        policy: what the data-parallel ranks share out.
        param_dtype: dtype of weights and compute.
        grad_dtype: dtype in which gradients are accumulated and reduced.
        device: where the buffers are.
        seed: seed of the initial weights.
        overlap: start a unit's reduction when its last gradient arrives instead of at the end of the stage.
    """

    policy: Policy
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    seed: int
    overlap: bool = True


@dataclass(frozen=True)
class Piece:
    """A contiguous part of the master weights that is treated alike: what the optimizer sees as one parameter."""

    parameter: nn.Parameter
    span: Span
    decays: bool


class FlatUnit:
    """One unit on one rank. `tied` is the axis of the other holders where the unit is a tied table, else None."""

    def __init__(
        self, name: str, declared: Sequence[Declared], mesh: Mesh, options: UnitOptions, *, tied: Axis | None
    ) -> None:
        self.name, self.mesh, self.options, self.tied = name, mesh, options, tied
        specs = [one.spec for one in declared]
        self.layout = flat_layout(specs, tp=mesh.tp.size, num_ranks=mesh.dp.size)
        whole = Span(0, self.layout.length)
        self.own = self.layout.slice_of(mesh.dp.rank, mesh.dp.size) if options.policy.shard_optimizer else whole
        self._allocate()
        self._by_name = {one.spec.name: one for one in declared}
        for slot in self.layout.slots:
            one, view = self._by_name[slot.spec.name], self.weights[slot.span.slice].view(slot.shape)
            one.owner.register_parameter(one.attribute, nn.Parameter(view))
        self.pieces = tuple(
            Piece(nn.Parameter(self.master[span.shifted(-self.own.start).slice]), span, decays)
            for decays, span in self.layout.optimizer_spans(self.own)
        )
        self._outstanding = 0
        self._reducing: Pending | None = None
        self.own_grads: Tensor | None = None

    def _allocate(self) -> None:
        options, mesh = self.options, self.mesh
        initial = torch.zeros(self.layout.length, device=options.device)
        for slot in self.layout.slots:
            shard = initial_shard(slot.spec, seed=options.seed, tp=mesh.tp.size, tp_rank=mesh.tp.rank)
            initial[slot.span.slice].copy_(shard.flatten())
        self.weights = initial.to(options.param_dtype)
        is_own_master = options.param_dtype == torch.float32
        self.master = self.weights[self.own.slice] if is_own_master else initial[self.own.slice].clone()
        self.grads = torch.zeros(self.layout.length, dtype=options.grad_dtype, device=options.device)

    def bind(self, sink: GradSink) -> None:
        """Send the gradients of the unit's parameters to its buffer."""
        for slot in self.layout.slots:
            parameter = self._by_name[slot.spec.name].parameter
            sink.bind(parameter, self.grads[slot.span.slice].view(slot.shape), self._on_arrival)

    def expect(self, contributions: int) -> None:
        """Say how many gradient contributions the coming step brings before the gradients are complete."""
        self._outstanding = contributions

    @property
    def is_complete(self) -> bool:
        """Whether every gradient contribution of this step has arrived."""
        return self._outstanding == 0

    def _on_arrival(self) -> None:
        self._outstanding -= 1
        assert self._outstanding >= 0, f"unit {self.name} got a gradient after all that were expected"
        if self._outstanding == 0 and self.options.overlap and self.tied is None:
            self.start_reduce()

    def start_reduce(self) -> None:
        """Start adding the gradients up over the ranks; does nothing where that has begun. Tied tables wait for all
        their holders and so start in `finish_reduce`."""
        if self._reducing is not None:
            return
        for segment in self.layout.segments:
            if segment.tp_gradient == "partial":
                all_reduce(self.grads[segment.span.slice], self.mesh.tp)
        if self.tied is not None:
            all_reduce(self.grads, self.tied)
        if self.options.policy.shard_optimizer:
            self._reducing = start_reduce_scatter(self.grads, self.mesh.dp)
        else:
            self._reducing = start_all_reduce(self.grads, self.mesh.dp)

    def finish_reduce(self) -> None:
        """Wait for the reduction and hand the optimizer's pieces their gradients, in fp32."""
        assert self._outstanding == 0, f"unit {self.name} lacks {self._outstanding} gradients of this step"
        self.start_reduce()
        assert self._reducing is not None, f"unit {self.name} has no reduction to finish"
        self.own_grads = self._reducing.wait().float()
        self._reducing = None
        for piece in self.pieces:
            piece.parameter.grad = self.own_grads[piece.span.shifted(-self.own.start).slice]

    def squared_norm(self) -> Tensor:
        """This rank's share of the sum of squared gradients, fp64: every logical element counts on one rank alone."""
        total = torch.zeros((), dtype=torch.float64, device=self.options.device)
        assert self.own_grads is not None, f"unit {self.name} has no reduced gradients"
        if not self.options.policy.shard_optimizer and self.mesh.dp.rank > 0:
            return total
        for segment in self.layout.segments:
            is_copy = segment.tied_copy or (segment.tp_gradient != "sharded" and self.mesh.tp.rank > 0)
            span = segment.span.intersect(self.own)
            if not is_copy and span.length:
                grads = self.own_grads[span.shifted(-self.own.start).slice]
                norm = torch.nn.utils.get_total_norm(grads.split(NORM_CHUNK))
                total += norm.double().square()
        return total

    def start_publish(self) -> Pending:
        """Bring updated master weights into the weights that the layers read, on every rank."""
        part = self.weights[self.own.slice]
        if part.data_ptr() != self.master.data_ptr():
            part.copy_(self.master)
        if not self.options.policy.shard_optimizer:
            return Pending(self.weights)
        return start_all_gather_into(self.weights, part, self.mesh.dp)

    def clear_grads(self) -> None:
        """Forget the gradients, for the next step."""
        self.grads.zero_()
        self.own_grads = None
        for piece in self.pieces:
            piece.parameter.grad = None

    def held_slots(self, *, with_copies: bool = True) -> Iterator[tuple[Slot, Span]]:
        """Slots of which this rank owns a part, with that part as a span of the flat buffer; copies of tied tables
        are left out unless `with_copies`."""
        for slot in self.layout.slots:
            span = slot.span.intersect(self.own)
            if span.length and (with_copies or not slot.spec.tied_copy):
                yield slot, span

    def piece_of(self, span: Span) -> Piece:
        """The piece in which a held part of a slot lies, given as a span of the flat buffer."""
        return next(piece for piece in self.pieces if piece.span.start <= span.start < piece.span.stop)

    def view(self, slot: Slot, span: Span, data: Tensor) -> ShardView:
        """What checkpoints store of a held part of a slot, whose elements are in the one-dimensional `data`."""
        at = span.shifted(-slot.span.start)
        boxes, covered = slot.spec.boxes(self.mesh.tp.size, self.mesh.tp.rank, at.start, at.stop)
        return ShardView(slot.spec.shape, boxes, data[:covered])
