"""FlatUnit: the parameters of one block in flat buffers, from initialisation to checkpoint.

A unit lays its parameters out, owns the buffers of their weights and gradients (`buffers.py`, where all that moves
them is), and knows which part of the master weights this rank updates and stores; the modules' parameters are views
into the weights. Frozen parameters are in a `WeightUnit`, which has weights and nothing else.

The gradient of a unit is complete after every micro-batch has contributed; then, in this order: the sum over the ranks
that shard its state, and on the part that is left the sum over the replicas, the sum of partial gradients over the
tensor axis, and the sum over the holders of a tied table. Sums are sums, so their order is free, and last is cheapest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from megatron3d.comm.collectives import all_reduce
from megatron3d.comm.mesh import Axis, Mesh
from megatron3d.errors import ConfigError
from megatron3d.params.boxes import ShardView
from megatron3d.params.grads import GradPlace, GradSink
from megatron3d.params.init import fill_initial
from megatron3d.params.module import Declared
from megatron3d.zero.block_buffers import BlockBacking, BlockedGradients, BlockedWeights
from megatron3d.zero.buffers import GradBuffer, TransientBuffers, WeightBacking, WeightBuffer
from megatron3d.zero.cut_tables import Blocks, block_name, unit_layout
from megatron3d.zero.flat import FlatLayout, Slot, Span, kind_of
from megatron3d.zero.kinds import KindAxes, kind_axes
from megatron3d.zero.offload import MASTER, Offload, states_record, weights_record
from megatron3d.zero.policy import Policy


@dataclass(frozen=True)
class UnitOptions:
    """What all units of a rank share.

    Attributes:
        policy: what the ranks that sum a gradient shard.
        param_dtype: dtype of weights and compute.
        grad_dtype: dtype in which gradients are accumulated and reduced.
        device: where the buffers are.
        seed: seed of the initial weights.
        overlap: start a unit's reduction when its last gradient arrives instead of at the end of the stage.
        overlap_gather: let the gathers of updated weights run into the next forward, up to the gates.
        prefetch: places ahead whose weights are on their way, where weights are gathered for use.
        offload: what lives off the device.
    """

    policy: Policy
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    seed: int
    overlap: bool = True
    overlap_gather: bool = False
    prefetch: int = 1
    offload: Offload = field(default_factory=Offload)


@dataclass(frozen=True)
class FlatParameter:
    """A contiguous part of the master weights that is treated alike: what the optimizer sees as one parameter."""

    parameter: nn.Parameter
    span: Span
    decays: bool


def layout_of_unit(declared: Sequence[Declared], axes: KindAxes, policy: Policy) -> FlatLayout:
    """Where the parameters of a unit lie."""
    specs, sharded = [one.spec for one in declared], policy.shard_params
    return unit_layout(specs, tp=axes.tensor.size, num_ranks=axes.grad.size, shards_weights=sharded)


class WeightUnit:
    """The weights of one unit on one rank, which are all that there is of frozen parameters.

    `tied` is the axis of the other holders where the unit is a tied table, else None; `blocks` are those that stage 3
    cuts a large table into.
    """

    def __init__(
        self,
        name: str,
        declared: Sequence[Declared],
        mesh: Mesh,
        options: UnitOptions,
        *,
        tied: Axis | None,
        transient: TransientBuffers | None = None,
        blocks: Blocks | None = None,
    ) -> None:
        self.name, self.options, self.tied, self.blocks = name, options, tied, blocks
        self.axes = kind_axes(kind_of([one.spec for one in declared]), mesh, options.policy)
        self.layout = layout_of_unit(declared, self.axes, options.policy)
        self.own = self.layout.slice_of(self.axes.shard.rank, self.axes.shard.size)
        self._by_name = {one.spec.name: one for one in declared}
        self.beside = self._allocate_beside()
        self._opened: Tensor | None = None
        self._allocate_weights(transient or TransientBuffers())

    def _allocate_beside(self) -> dict[str, Tensor]:
        """By kind the state beside parameters, flat like the master weights and where they live, or on the host where
        those are in files."""
        kinds = {kind: dtype for one in self._by_name.values() for kind, dtype in one.beside.items()}
        device = self.options.device if self.options.offload.states is None else torch.device("cpu")
        return {kind: torch.zeros(self.own.length, dtype=dtype, device=device) for kind, dtype in kinds.items()}

    def _allocate_weights(self, transient: TransientBuffers) -> None:
        initial = self._initial()
        keeps_master = self._keeps_master_on_device(initial)
        dtype, axis = self.options.param_dtype, self.axes.gather
        if self.blocks is None:
            self.weights = WeightBuffer(
                initial,
                self.own,
                axis,
                dtype=dtype,
                is_sharded=self.options.policy.shard_params,
                transient=transient,
                keeps_master=keeps_master,
                backing=self._backing(),
            )
        else:
            self.weights = BlockedWeights(
                initial,
                self.own,
                axis,
                blocks=self.blocks,
                dtype=dtype,
                transient=transient,
                keeps_master=keeps_master,
                backing=self._block_backing(self.blocks),
            )
        for slot in self.layout.slots:
            one, view = self._by_name[slot.spec.name], self.weights.full[slot.span.slice].view(slot.shape)
            one.owner.register_parameter(one.attribute, nn.Parameter(view, requires_grad=slot.spec.trains))
        self.weights.free()

    def _backing(self) -> WeightBacking | None:
        backing = self.options.offload.weights
        if backing is None:
            return None
        backing.add(self.name, weights_record(self.own.length, self.options.param_dtype))
        return WeightBacking(backing, self.name)

    def _block_backing(self, blocks: Blocks) -> BlockBacking | None:
        backing = self.options.offload.weights
        if backing is None:
            return None
        width = self.own.length // blocks[0].rows_per_rank
        lengths = tuple(block.rows_of_each * width for block in blocks)
        for number, length in enumerate(lengths):
            backing.add(block_name(self.name, number), weights_record(length, self.options.param_dtype))
        return BlockBacking(backing, self.name, lengths)

    def _keeps_master_on_device(self, initial: Tensor) -> bool:
        """Whether fp32 weights are kept beside those of the layers; `initial` are the unit's first ones, fp32."""
        return False

    def _initial(self) -> Tensor:
        """The unit's initial values, fp32; where weights are sharded the part that this rank owns, among zeros."""
        options, tp = self.options, self.axes.tensor
        drawn = self.own if options.policy.shard_params else Span(0, self.layout.length)
        initial = torch.zeros(self.layout.length, device=options.device)
        for slot in self.layout.slots:
            span = slot.span.intersect(drawn)
            part, start = initial[span.slice], span.start - slot.span.start
            values = part if part.device.type == "cpu" else torch.empty(span.length)
            fill_initial(values, slot.spec, seed=options.seed, tp=tp.size, tp_rank=tp.rank, start=start)
            if values is not part:
                part.copy_(values)
        return initial

    @property
    def master(self) -> Tensor:
        """This rank's part of the weights, as checkpoints store them; where they are offloaded, only while they are
        open. Frozen weights have the dtype in which the layers read them."""
        if self.options.offload.weights is None:
            return self.weights.shard
        assert self._opened is not None, f"the weights of unit {self.name} are offloaded and not open"
        return self._opened

    def blocked_tables(self) -> Iterator[tuple[nn.Parameter, BlockedWeights]]:
        """The parameter of a table that is cut into blocks, with its weights; nothing of any other unit."""
        if isinstance(self.weights, BlockedWeights):
            for declared in self._by_name.values():
                yield declared.parameter, self.weights

    @property
    def stores_layer_weights(self) -> bool:
        """Whether `master` is the weights that the layers read, and not a copy in fp32."""
        return True

    @contextmanager
    def opened(self, *, writes: bool) -> Iterator[None]:
        """Have `master` for the length of a block, wherever it lives; `writes` keeps changes."""
        with self.weights.shard_opened(writes=writes) as self._opened:
            try:
                yield
            finally:
                self._opened = None

    def held_slots(self, *, with_copies: bool = True) -> Iterator[tuple[Slot, Span]]:
        """Slots of which this rank owns a part, with that part as a span of the flat buffer; copies of tied tables
        are left out unless `with_copies`."""
        for slot in self.layout.slots:
            span = slot.span.intersect(self.own)
            if span.length and (with_copies or not slot.spec.tied_copy):
                yield slot, span

    def beside_views(self, *, with_copies: bool = True) -> dict[str, ShardView]:
        """This rank's part of the state beside parameters, by "kind/parameter name"; copies as in `held_slots`."""
        return {
            f"{kind}/{slot.spec.name}": self.view(slot, span, self.beside[kind][span.shifted(-self.own.start).slice])
            for slot, span in self.held_slots(with_copies=with_copies)
            for kind in self._by_name[slot.spec.name].beside
        }

    def view(self, slot: Slot, span: Span, data: Tensor) -> ShardView:
        """What checkpoints store of a held part of a slot, whose elements are in the one-dimensional `data`."""
        at = span.shifted(-slot.span.start)
        boxes, covered = slot.spec.boxes(self.axes.tensor.size, self.axes.tensor.rank, at.start, at.stop)
        return ShardView(slot.spec.shape, boxes, data[:covered])


class FlatUnit(WeightUnit):
    """One unit of parameters that train, on one rank; `tied` as in `WeightUnit`."""

    def __init__(
        self,
        name: str,
        declared: Sequence[Declared],
        mesh: Mesh,
        options: UnitOptions,
        *,
        tied: Axis | None,
        transient: TransientBuffers | None = None,
        blocks: Blocks | None = None,
    ) -> None:
        transient = transient or TransientBuffers()
        super().__init__(name, declared, mesh, options, tied=tied, transient=transient, blocks=blocks)
        self.grads = self._allocate_gradients(transient)
        self.flat_parameters = tuple(
            FlatParameter(nn.Parameter(self._master_of(span)), span, decays)
            for decays, span in self.layout.optimizer_spans(self.own)
        )
        self._places: list[GradPlace] = []
        self._outstanding = 0
        self._until_start = 0
        self._is_reduced = False

    def _allocate_gradients(self, transient: TransientBuffers) -> GradBuffer:
        dtype, device = self.options.grad_dtype, self.options.device
        if self.blocks is not None:
            blocks = self.blocks
            return BlockedGradients(self.own, self.axes, blocks=blocks, dtype=dtype, device=device, transient=transient)
        return GradBuffer(
            self.layout.length,
            self.own,
            self.axes,
            dtype=dtype,
            device=device,
            is_resident=not self.options.policy.shard_grads,
            transient=transient,
        )

    def _keeps_master_on_device(self, initial: Tensor) -> bool:
        offload = self.options.offload
        if offload.states is None:
            return True
        own = initial[self.own.slice]
        for name, span in self.state_records():
            offload.states.add(name, states_record(span.length, offload.state_kinds))
            with offload.states.opened([name], writes=True) as records:
                records[name][MASTER].copy_(own[span.slice])
        return False

    def state_records(self) -> list[tuple[str, Span]]:
        """The records that offloaded states are kept in, and the range of the part that this rank updates which each
        holds: one of all, or one of each block of a table that is cut."""
        if self.blocks is None:
            return [(self.name, Span(0, self.own.length))]
        width = self.own.length // self.blocks[0].rows_per_rank
        spans = [Span(block.start * width, block.stop * width) for block in self.blocks]
        return [(block_name(self.name, number), span) for number, span in enumerate(spans)]

    @property
    def master(self) -> Tensor:
        """The fp32 weights of the part that this rank updates; where they are offloaded, only while they are open."""
        assert self.weights.master is not None, f"the master weights of unit {self.name} are offloaded and not open"
        return self.weights.master

    @property
    def stores_layer_weights(self) -> bool:
        """Whether `master` is the weights that the layers read, and not a copy in fp32."""
        return self.weights.master is self.weights.shard

    def _master_of(self, span: Span) -> Tensor:
        """What the optimizer gets of a span: nothing yet where it is offloaded."""
        if self.options.offload.states is not None:
            return torch.empty(0)
        return self.master[span.shifted(-self.own.start).slice]

    @property
    def own_grads(self) -> Tensor:
        """The reduced gradients of the part that this rank updates, fp32; between `finish_reduce` and `clear_grads`."""
        assert self._is_reduced, f"unit {self.name} has no reduced gradients"
        return self.grads.own

    def bind(self, sink: GradSink) -> None:
        """Send the gradients of the unit's parameters to its buffer."""
        for slot in self.layout.slots:
            parameter = self._by_name[slot.spec.name].parameter
            if isinstance(self.grads, BlockedGradients):
                sink.bind_blocks(parameter, self.grads, self._on_arrival)
            elif self.grads.is_resident:
                place = sink.bind(parameter, self._buffer_of(slot), self._on_arrival)
                place.is_empty = True
                self._places.append(place)
            else:
                sink.bind_late(parameter, partial(self._buffer_of, slot), self._on_arrival)

    def _buffer_of(self, slot: Slot) -> Tensor:
        return self.grads.arriving[slot.span.slice].view(slot.shape)

    def expect(self, contributions: int) -> None:
        """Say how many gradient contributions the coming step brings before the gradients are complete."""
        self._outstanding = contributions
        self._until_start = contributions if self.grads.is_resident else 0

    def expect_in_backward(self, contributions: int) -> None:
        """Say how many of them the coming backward brings, where every backward is reduced by itself."""
        if not self.grads.is_resident:
            self._until_start = contributions

    @property
    def is_complete(self) -> bool:
        """Whether every gradient contribution of this step has arrived."""
        return self._outstanding == 0

    def _on_arrival(self) -> None:
        self._outstanding -= 1
        self._until_start -= 1
        assert self._outstanding >= 0, f"unit {self.name} got a gradient after all that were expected"
        if self._until_start == 0 and self.options.overlap:
            self.start_reduce()

    def start_reduce(self) -> None:
        """Start summing what has arrived over the ranks that shard the state; nothing where that has begun."""
        self.grads.start_scatter()

    def start_finishing(self) -> None:
        """Once all micro-batches are in: start the sum over the replicas.

        Raises: ConfigError if a parameter of the model had no part in the loss.
        """
        if not self.is_complete:
            names = ", ".join(slot.spec.name for slot in self.layout.slots)
            raise ConfigError(
                f"{self.name} lacks {self._outstanding} of this step's gradients: each of its parameters ({names}) "
                "must have an effect on the loss in every micro-batch; name one that has none in --freeze-params"
            )
        self.grads.start_scatter()
        self.grads.finish_scatter()
        self.grads.start_replica_sum()

    def finish_reduce(self) -> None:
        """Complete the sums over the replicas and the holders of a tied table. `own_grads` then has this rank's part,
        fp32, of which `partial_grads` are still to be added up."""
        self.start_finishing()
        self.grads.finish_replica_sum()
        if self.tied is not None:
            all_reduce(self.grads.own, self.tied)
        self._is_reduced = True

    def partial_grads(self) -> Iterator[Tensor]:
        """Views of `own_grads` that are partial sums over the tensor axis."""
        for segment in self.layout.segments:
            span = segment.span.intersect(self.own)
            if segment.tp_gradient == "partial" and span.length:
                yield self.own_grads[span.shifted(-self.own.start).slice]

    def counted_grads(self) -> Iterator[Tensor]:
        """Reduced gradients that this rank counts for their norm; every logical element counts on one rank alone."""
        if self.axes.replica.rank > 0:
            return
        for segment in self.layout.segments:
            is_copy = segment.tied_copy or (segment.tp_gradient != "sharded" and self.axes.tensor.rank > 0)
            span = segment.span.intersect(self.own)
            if not is_copy and span.length:
                yield self.own_grads[span.shifted(-self.own.start).slice]

    def clear_grads(self) -> None:
        """Forget the gradients, for the next step."""
        self.grads.clear()
        for place in self._places:
            place.is_empty = True
        self._is_reduced = False

    @contextmanager
    def gradients_attached(self, gradients: Tensor, at: Span | None = None) -> Iterator[None]:
        """Let the optimizer see `gradients`, of the part that this rank updates or of the range `at` of it, for the
        length of its step.

        Only who makes the step calls this, in whichever thread it runs: outside of it no flat parameter has a
        gradient, and nothing else sets or clears one.
        """
        at = at or Span(0, self.own.length)
        for flat in self.flat_parameters:
            within = flat.span.shifted(-self.own.start).intersect(at).shifted(-at.start)
            flat.parameter.grad = gradients[within.slice] if within.length else None
        try:
            yield
        finally:
            for flat in self.flat_parameters:
                flat.parameter.grad = None

    def flat_parameter_of(self, span: Span) -> FlatParameter:
        """The flat parameter in which a held part of a slot lies, given as a span of the flat buffer."""
        return next(flat for flat in self.flat_parameters if flat.span.start <= span.start < flat.span.stop)
