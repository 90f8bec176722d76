"""ZeroEngine: all flat units of one rank: gradients in, updated weights out, and what checkpoints store.

One optimizer step is: `begin_step`; backwards, each between `before_backward` and `after_backward`, during which units
start their reductions; `finish_reduce`, `squared_norm`, `scale_grads`, `step`, `clear_grads`. The stages of ZeRO differ
in the rows of `policy.py` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron3d.comm.collectives import all_reduce_together
from megatron3d.comm.mesh import Mesh
from megatron3d.params.boxes import ShardView
from megatron3d.params.gate import WeightGate
from megatron3d.params.grads import GradSink
from megatron3d.params.module import Declared
from megatron3d.params.norms import sum_of_squares
from megatron3d.zero.buffers import TransientBuffers, size_bytes
from megatron3d.zero.cut_tables import Blocks, cut_tables
from megatron3d.zero.delayed import DelayedUpdate
from megatron3d.zero.full_parameters import FullParameters
from megatron3d.zero.gatherer import Places, UnitGatherer
from megatron3d.zero.kinds import kind_axes
from megatron3d.zero.offload_step import OffloadedStates
from megatron3d.zero.policy import Policy
from megatron3d.zero.unit import FlatParameter, FlatUnit, UnitOptions, WeightUnit, layout_of_unit


@dataclass(frozen=True)
class UnitParameters:
    """The parameters of one unit, which train or are frozen all together; the stages of this rank that use them, how
    many gradient contributions one backward of all of these brings, and whether it is a tied table with other
    holders."""

    stages: tuple[int, ...]
    declared: tuple[Declared, ...]
    contributions: int
    is_tied: bool

    @property
    def trains(self) -> bool:
        """Whether the parameters get gradients."""
        return self.declared[0].spec.trains


@dataclass(frozen=True)
class StateBytes:
    """Bytes that this rank holds of each kind of state, and the most that buffers taken for a while have come to;
    `beside` is declared state beside parameters, wherever it lives, `host` and `files` are the offloaded bytes there,
    with staging buffers."""

    weights: int
    gradients: int
    master_weights: int
    beside: int
    transient_peak: int
    host: int = 0
    files: int = 0


class ZeroEngine:
    """The units of this rank in the order in which they are reduced and published, which all ranks share."""

    def __init__(
        self,
        parameters: Mapping[str, UnitParameters],
        mesh: Mesh,
        options: UnitOptions,
        sink: GradSink,
        *,
        gate: WeightGate | None = None,
        places: Places | None = None,
    ) -> None:
        """Args: `gate` and `places` are those of the stages, which options that move weights need."""
        self.options = options
        self.parameters = dict(parameters)
        self.transient = TransientBuffers()
        self.units: dict[str, WeightUnit] = {}
        blocks = _blocks_of(parameters, mesh, options.policy)
        for name, unit in parameters.items():
            tied = mesh.tied if unit.is_tied else None
            kind = FlatUnit if unit.trains else WeightUnit
            self.units[name] = kind(
                name, unit.declared, mesh, options, tied=tied, transient=self.transient, blocks=blocks.get(name)
            )
        self.trained = {name: unit for name, unit in self.units.items() if isinstance(unit, FlatUnit)}
        self.full_parameters = FullParameters(self.trained, mesh, options)
        for unit in self.trained.values():
            unit.bind(sink)
        self.gatherer = UnitGatherer(
            {name: unit.weights for name, unit in self.units.items()},
            places or {},
            releases=options.policy.shard_params,
            prefetch=options.prefetch,
            tables=dict(table for unit in self.units.values() for table in unit.blocked_tables()),
        )
        if gate is not None:
            gate.bind(self.gatherer)
        self._away: OffloadedStates | None = None
        self._delayed: DelayedUpdate | None = None
        if options.offload.states is not None:
            self._away = OffloadedStates(self.trained, options.offload, options.device)
            if options.offload.delays_update:
                self._delayed = DelayedUpdate(self._away, self.trained, options.device)

    @property
    def flat_parameters(self) -> list[FlatParameter]:
        """What the optimizer updates."""
        return [flat for unit in self.trained.values() for flat in unit.flat_parameters]

    def begin_step(self, num_microbatches: int) -> None:
        """Expect the gradients of this many micro-batches."""
        for name, unit in self.trained.items():
            unit.expect(self.parameters[name].contributions * num_microbatches)

    def before_backward(self, stage: int) -> None:
        """A backward of a stage, or its weight-gradient half, begins."""
        self.gatherer.begin_backward()
        for name, unit in self._units_of(stage):
            used_once = len(self.parameters[name].stages) == 1
            unit.expect_in_backward(self.parameters[name].contributions if used_once else 0)

    def after_backward(self, stage: int) -> None:
        """It is over: reduce what it brought where gradients are sharded, free what was gathered for it."""
        self.gatherer.end_backward(stage)
        if self.options.policy.shard_grads:
            for _, unit in self._units_of(stage):
                unit.start_reduce()

    def reduce_stage(self, stage: int) -> None:
        """Start the reductions of a stage whose backwards are done, but for units that other stages still use."""
        for _, unit in self._units_of(stage):
            if unit.is_complete:
                unit.start_reduce()

    def finish_reduce(self) -> None:
        """Wait until every unit's gradients are added up over all ranks, and bring a delayed update to the layers."""
        self.finish_update()
        for unit in self.trained.values():
            unit.start_reduce()
        for unit in self.trained.values():
            unit.start_finishing()
        for unit in self.trained.values():
            unit.finish_reduce()
        partial: dict[str, list[Tensor]] = {}
        axes = {unit.axes.tensor.name: unit.axes.tensor for unit in self.trained.values()}
        for unit in self.trained.values():
            partial.setdefault(unit.axes.tensor.name, []).extend(unit.partial_grads())
        for name, gradients in partial.items():
            all_reduce_together(gradients, axes[name])

    def _units_of(self, stage: int) -> list[tuple[str, FlatUnit]]:
        return [(name, unit) for name, unit in self.trained.items() if stage in self.parameters[name].stages]

    def squared_norm(self) -> Tensor:
        """This rank's share of the global squared gradient norm, fp64; shares add up over all ranks of the mesh."""
        counted = [gradient for unit in self.trained.values() for gradient in unit.counted_grads()]
        return sum_of_squares(counted, self.options.device)

    def scale_grads(self, factor: float) -> None:
        """Multiply the reduced gradients, for clipping and for a loss scale, where the optimizer does not."""
        if factor != 1.0:
            for unit in self.trained.values():
                unit.own_grads.mul_(factor)

    def layer_copies(self) -> dict[nn.Parameter, Tensor]:
        """What the layers compute with of each flat parameter, in another dtype; nothing where that is the parameter
        itself, or where it is offloaded."""
        if self.options.offload.states is not None:
            return {}
        return {
            flat.parameter: unit.weights.shard[flat.span.shifted(-unit.own.start).slice]
            for unit in self.trained.values()
            if not unit.stores_layer_weights
            for flat in unit.flat_parameters
        }

    def step(self, optimizer: torch.optim.Optimizer, *, writes_copies: bool = False) -> None:
        """Update the master weights of this rank's part, and bring them to the layers; `writes_copies` says that the
        optimizer writes `layer_copies` as it updates.

        With a delayed update this starts the update, and the optimizer with its rates is its thread's until
        `finish_reduce` of the step after, `finish_update` or `states_opened`.

        Raises:
            StorageError: a file of offloaded state could not be read or written, or is damaged.
        """
        if self._delayed is not None:
            self._delayed.start(optimizer)
            return
        if self._away is not None:
            assert not writes_copies, "what is offloaded has no copies on the device that an optimizer could write"
            self._away.step(optimizer)
        else:
            self.finish_publish()  # in fp32 the master weights lie in the buffer that a gather under way writes to
            with ExitStack() as attached:
                for unit in self.trained.values():
                    attached.enter_context(unit.gradients_attached(unit.own_grads))
                optimizer.step()
        self._start_publish(is_copied=writes_copies)

    def finish_update(self) -> None:
        """Bring the weights of a delayed update to the layers; nothing where none is due.

        Raises:
            StorageError: a file of offloaded state could not be read or written, or is damaged.
        """
        if self._delayed is not None and self._delayed.finish():
            self._start_publish()

    @property
    def is_update_due(self) -> bool:
        """Whether the layers compute with weights that are older than the master weights; the same on all ranks."""
        return self._delayed is not None and self._delayed.is_due

    @contextmanager
    def updated_weights(self) -> Iterator[None]:
        """Have the weights of the last update in the layers, to measure them; then those of before come back.

        Collective over all ranks. Without a delayed update they are there anyway, and nothing happens; blocks may be
        nested. An error ends the run, so a block that raises leaves the updated weights where they are rather than
        wait for ranks that may never come; a checkpoint is right nonetheless.
        """
        if self._delayed is None or not self._delayed.show():
            yield
            return
        self._start_publish()
        yield
        self._delayed.hide()
        self._start_publish()

    @contextmanager
    def states_opened(self, optimizer: torch.optim.Optimizer, *, writes: bool) -> Iterator[None]:
        """Have all master weights and optimizer states at hand for a checkpoint, wherever they live.

        They belong to the block: a delayed update is waited for, without bringing its weights to the layers, and so
        are gathers under way, which write the buffer in which fp32 master weights lie. `weight_views`, `state_views`
        and `old_weight_views` are valid within. `writes` says that the block changes them; call `publish` afterwards.

        Raises:
            StorageError: a file of offloaded state could not be read, or is damaged.
        """
        with ExitStack() as stack:
            if self._delayed is not None:
                stack.enter_context(self._delayed.opened())
            self.finish_publish()
            if self._away is not None:
                stack.enter_context(self._away.opened(optimizer, writes=writes))
            for unit in self.units.values():
                if not isinstance(unit, FlatUnit):
                    stack.enter_context(unit.opened(writes=writes))
            yield

    def publish(self) -> None:
        """Bring the master weights to the layers of every rank, as after a load; see `finish_publish`."""
        if self._delayed is not None:
            self._delayed.supersede()
        if self._away is not None:
            self._away.bring_weights()
        self._start_publish(with_frozen=True)

    def _start_publish(self, *, with_frozen: bool = False, is_copied: bool = False) -> None:
        """Bring the shards to the layers of every rank; those of frozen weights, which no step changes, after a load.
        `is_copied` says that the shards have the master weights already.

        With `overlap_gather` this returns while they are on their way; whoever reads them waits at a gate, or for
        `finish_publish`.
        """
        for unit in (self.units if with_frozen else self.trained).values():
            unit.weights.start_publish(is_copied=is_copied)
        if not self.options.overlap_gather:
            self.finish_publish()

    def finish_publish(self) -> None:
        """Wait until the weights of every unit that keeps them have arrived."""
        for unit in self.units.values():
            unit.weights.finish_gather()

    def clear_grads(self) -> None:
        """Forget the gradients, for the next step."""
        for unit in self.trained.values():
            unit.clear_grads()

    def weight_views(self, *, with_copies: bool = True) -> dict[str, ShardView]:
        """The master weights this rank owns, by full parameter name. After a load into them call `publish`.

        Copies of tied tables, which a save leaves to their owner, are left out unless `with_copies`.
        """
        masters = {name: unit.master for name, unit in self.units.items()}
        return self._views_of(masters, with_copies=with_copies)

    def state_views(
        self, optimizer: torch.optim.Optimizer, state_name: str, *, with_copies: bool = True
    ) -> dict[str, ShardView]:
        """One kind of optimizer state (such as "exp_avg") that has an element for each of the parameter's, by full
        name of the parameters that have it; copies as in `weight_views`."""
        views = {}
        for unit in self.trained.values():
            for slot, span in unit.held_slots(with_copies=with_copies):
                flat = unit.flat_parameter_of(span)
                state = optimizer.state[flat.parameter].get(state_name)
                if state is not None:
                    views[slot.spec.name] = unit.view(slot, span, state[span.shifted(-flat.span.start).slice])
        return views

    def beside_views(self, *, with_copies: bool = True) -> dict[str, ShardView]:
        """This rank's part of declared state beside parameters, by "kind/parameter name"; copies as in
        `weight_views`."""
        found = [unit.beside_views(with_copies=with_copies) for unit in self.units.values()]
        return {name: view for views in found for name, view in views.items()}

    def old_weight_views(self, *, with_copies: bool = True) -> dict[str, ShardView]:
        """This rank's part of the weights that training computes with while a delayed update is due, in their dtype
        and by full parameter name; nothing where none is due. Copies as in `weight_views`."""
        return {} if self._delayed is None else self._views_of(self._delayed.old_weights, with_copies=with_copies)

    @contextmanager
    def delayed_update_restored(self) -> Iterator[dict[str, ShardView]]:
        """Take up an update that was due when the checkpoint was saved whose master weights have been published.

        The block loads what `old_weight_views` had into the views it is given; training then computes with that. Where
        updates are not delayed there are no views, and the published weights stay.
        """
        if self._delayed is None:
            yield {}
            return
        with self._delayed.restored() as buffers:
            yield self._views_of(buffers, with_copies=True)
        self._start_publish()

    def _views_of(self, buffers: Mapping[str, Tensor], *, with_copies: bool) -> dict[str, ShardView]:
        """Views of buffers with this rank's part of each unit."""
        views = {}
        for name, buffer in buffers.items():
            unit = self.units[name]
            for slot, span in unit.held_slots(with_copies=with_copies):
                views[slot.spec.name] = unit.view(slot, span, buffer[span.shifted(-unit.own.start).slice])
        return views

    def grad_views(self) -> dict[str, ShardView]:
        """The reduced gradients this rank owns, fp32, by full parameter name; between `finish_reduce` and
        `clear_grads`."""
        gradients = {name: unit.own_grads for name, unit in self.trained.items()}
        return self._views_of(gradients, with_copies=True)

    def state_bytes(self) -> StateBytes:
        """Bytes of weights, gradients and separate master weights, as allocated from step to step, and of what is
        offloaded."""
        units, trained, offload = self.units.values(), self.trained.values(), self.options.offload
        backings = [backing for backing in (offload.states, offload.weights) if backing is not None]
        return StateBytes(
            weights=sum(unit.weights.persistent_bytes for unit in units),
            gradients=sum(unit.grads.persistent_bytes for unit in trained),
            master_weights=sum(unit.weights.separate_master_bytes for unit in trained),
            beside=sum(size_bytes(one) for unit in units for one in unit.beside.values()),
            transient_peak=self.transient.peak_bytes,
            host=sum(backing.host_bytes for backing in backings)
            + sum(one.buffer_bytes for one in (self._away, self._delayed) if one is not None),
            files=sum(backing.file_bytes for backing in backings),
        )


def _blocks_of(parameters: Mapping[str, UnitParameters], mesh: Mesh, policy: Policy) -> dict[str, Blocks]:
    """The blocks of each unit that is a table to be cut; none where weights are not sharded."""
    if not policy.shard_params:
        return {}
    axes = {name: kind_axes(unit.declared[0].spec.kind, mesh, policy) for name, unit in parameters.items()}
    layouts = {name: layout_of_unit(one.declared, axes[name], policy) for name, one in parameters.items()}
    return cut_tables(layouts, lambda kind: kind_axes(kind, mesh, policy).shard.size)
