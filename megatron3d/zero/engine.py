"""ZeroEngine: all flat units of one rank: gradients in, updated weights out, and what checkpoints store.

One optimizer step is: `begin_step`; backwards, each between `before_backward` and `after_backward`, during which units
start their reductions; `finish_reduce`, `squared_norm`, `scale_grads`, `step`, `clear_grads`. The stages of ZeRO differ
in the rows of `policy.py` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron3d.comm.mesh import Mesh
from megatron3d.params.boxes import ShardView
from megatron3d.params.gate import WeightGate
from megatron3d.params.grads import GradSink
from megatron3d.params.module import Declared
from megatron3d.zero.buffers import Transit
from megatron3d.zero.lending import Lending, Places
from megatron3d.zero.offload_step import OffloadedStates
from megatron3d.zero.unit import FlatUnit, Piece, UnitOptions
from megatron3d.zero.whole import WholeParameters


@dataclass(frozen=True)
class UnitParameters:
    """The parameters of one unit, the stages of this rank that use them, how many gradient contributions one
    backward of all of these brings, and whether it is a tied table with other holders."""

    stages: tuple[int, ...]
    declared: tuple[Declared, ...]
    contributions: int
    is_tied: bool


@dataclass(frozen=True)
class StateBytes:
    """Bytes that this rank holds of each kind of state, and the most that buffers taken for a while have come to;
    `host` and `files` are the offloaded bytes there, with staging buffers."""

    weights: int
    gradients: int
    master_weights: int
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
        self.transit = Transit()
        self.units: dict[str, FlatUnit] = {}
        for name, unit in parameters.items():
            tied = mesh.tied if unit.is_tied else None
            self.units[name] = FlatUnit(name, unit.declared, mesh, options, tied=tied, transit=self.transit)
        self.whole = WholeParameters(self.units, mesh, options)
        for unit in self.units.values():
            unit.bind(sink)
        self.lending = Lending(
            {name: unit.weights for name, unit in self.units.items()},
            places or {},
            takes_back=options.policy.shard_params,
            prefetch=options.prefetch,
        )
        if gate is not None:
            gate.bind(self.lending)
        self._away: OffloadedStates | None = None
        if options.offload.states is not None:
            self._away = OffloadedStates(self.units, options.offload, options.device)

    @property
    def pieces(self) -> list[Piece]:
        """What the optimizer updates."""
        return [piece for unit in self.units.values() for piece in unit.pieces]

    def begin_step(self, num_microbatches: int) -> None:
        """Expect the gradients of this many micro-batches."""
        for name, unit in self.units.items():
            unit.expect(self.parameters[name].contributions * num_microbatches)

    def before_backward(self, stage: int) -> None:
        """A backward of a stage, or its weight-gradient half, begins."""
        self.lending.begin_backward()
        for name, unit in self._units_of(stage):
            used_once = len(self.parameters[name].stages) == 1
            unit.expect_in_backward(self.parameters[name].contributions if used_once else 0)

    def after_backward(self, stage: int) -> None:
        """It is over: reduce what it brought where gradients are sharded, free what it borrowed."""
        self.lending.end_backward(stage)
        if self.options.policy.shard_grads:
            for _, unit in self._units_of(stage):
                unit.start_reduce()

    def reduce_stage(self, stage: int) -> None:
        """Start the reductions of a stage whose backwards are done, but for units that other stages still use."""
        for _, unit in self._units_of(stage):
            if unit.is_complete:
                unit.start_reduce()

    def finish_reduce(self) -> None:
        """Wait until every unit's gradients are added up over all ranks, and for a delayed update."""
        self.finish_update()
        for unit in self.units.values():
            unit.start_reduce()
        for unit in self.units.values():
            unit.start_finishing()
        for unit in self.units.values():
            unit.finish_reduce()

    def _units_of(self, stage: int) -> list[tuple[str, FlatUnit]]:
        return [(name, unit) for name, unit in self.units.items() if stage in self.parameters[name].stages]

    def squared_norm(self) -> Tensor:
        """This rank's share of the global squared gradient norm, fp64; shares add up over all ranks of the mesh."""
        shares = [unit.squared_norm() for unit in self.units.values()]
        return torch.stack(shares).sum() if shares else torch.zeros((), dtype=torch.float64)

    def scale_grads(self, factor: float) -> None:
        """Multiply the reduced gradients, for clipping and for taking a loss scale out."""
        if factor != 1.0:
            for unit in self.units.values():
                assert unit.own_grads is not None, f"unit {unit.name} has no reduced gradients"
                unit.own_grads.mul_(factor)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the master weights of this rank's part, and bring them to the layers.

        Raises:
            StorageError: a file of offloaded state could not be read or written, or is damaged.
        """
        if self._away is None:
            optimizer.step()
            self._start_publish()
        elif self._away.delays_update:
            self._away.start_step(optimizer)
        else:
            self._away.step(optimizer)
            self._start_publish()

    def finish_update(self) -> None:
        """Bring the weights of a delayed update to the layers; nothing where none is under way."""
        if self._away is not None and self._away.finish_step():
            self._start_publish()

    @contextmanager
    def states_opened(self, optimizer: torch.optim.Optimizer, *, writes: bool) -> Iterator[None]:
        """Have all master weights and optimizer states at hand for a checkpoint, wherever they live.

        `weight_views` and `state_views` are valid within. `writes` says that the block changes them; call `publish`
        afterwards.

        Raises:
            StorageError: a file of offloaded state could not be read, or is damaged.
        """
        self.finish_update()
        if self._away is None:
            yield
        else:
            with self._away.opened(optimizer, writes=writes):
                yield

    def publish(self) -> None:
        """Bring the master weights to the layers of every rank, as after a load; see `finish_publish`."""
        if self._away is not None:
            self._away.bring_weights()
        self._start_publish()

    def _start_publish(self) -> None:
        """Bring the shards to the layers of every rank.

        With `overlap_gather` this returns while they are on their way; whoever reads them waits at a gate, or for
        `finish_publish`.
        """
        for unit in self.units.values():
            unit.weights.start_publish()
        if not self.options.overlap_gather:
            self.finish_publish()

    def finish_publish(self) -> None:
        """Wait until the weights of every unit that keeps them have arrived."""
        for unit in self.units.values():
            unit.weights.finish_gather()

    def clear_grads(self) -> None:
        """Forget the gradients, for the next step."""
        for unit in self.units.values():
            unit.clear_grads()

    def weight_views(self, *, with_copies: bool = True) -> dict[str, ShardView]:
        """The master weights this rank owns, by full parameter name. After a load into them call `publish`.

        Copies of tied tables, which a save leaves to their owner, are left out unless `with_copies`.
        """
        views = {}
        for unit in self.units.values():
            for slot, span in unit.held_slots(with_copies=with_copies):
                data = unit.master[span.shifted(-unit.own.start).slice]
                views[slot.spec.name] = unit.view(slot, span, data)
        return views

    def state_views(
        self, optimizer: torch.optim.Optimizer, state_name: str, *, with_copies: bool = True
    ) -> dict[str, ShardView]:
        """One kind of optimizer state (such as "exp_avg") that has an element for each of the parameter's, by full
        name of the parameters that have it; copies as in `weight_views`."""
        views = {}
        for unit in self.units.values():
            for slot, span in unit.held_slots(with_copies=with_copies):
                piece = unit.piece_of(span)
                state = optimizer.state[piece.parameter].get(state_name)
                if state is not None:
                    views[slot.spec.name] = unit.view(slot, span, state[span.shifted(-piece.span.start).slice])
        return views

    def grad_views(self) -> dict[str, ShardView]:
        """The reduced gradients this rank owns, fp32, by full parameter name; between `finish_reduce` and
        `clear_grads`."""
        views = {}
        for unit in self.units.values():
            assert unit.own_grads is not None, f"unit {unit.name} has no reduced gradients"
            for slot, span in unit.held_slots():
                views[slot.spec.name] = unit.view(slot, span, unit.own_grads[span.shifted(-unit.own.start).slice])
        return views

    def state_bytes(self) -> StateBytes:
        """Bytes of weights, gradients and separate master weights, as allocated from step to step, and of what is
        offloaded."""
        units, offload = list(self.units.values()), self.options.offload
        homes = [home for home in (offload.states, offload.weights) if home is not None]
        return StateBytes(
            weights=sum(unit.weights.persistent_bytes for unit in units),
            gradients=sum(unit.grads.persistent_bytes for unit in units),
            master_weights=sum(unit.weights.separate_master_bytes for unit in units),
            transient_peak=self.transit.peak_bytes,
            host=sum(home.host_bytes for home in homes) + (self._away.buffer_bytes if self._away else 0),
            files=sum(home.file_bytes for home in homes),
        )
