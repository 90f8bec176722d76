"""ZeroEngine: all flat units of one rank: gradients in, updated weights out, and what checkpoints store.

One optimizer step is: `begin_step`, backwards (during which units start their reductions), `finish_reduce`,
`squared_norm`, `scale_grads`, the optimizer's step on `pieces`, `publish`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron3d.comm.mesh import Mesh
from megatron3d.params.boxes import ShardView
from megatron3d.params.grads import GradSink
from megatron3d.params.module import Declared
from megatron3d.zero.unit import FlatUnit, Piece, UnitOptions


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
    """Bytes that this rank holds of each kind of state."""

    weights: int
    gradients: int
    master_weights: int


class ZeroEngine:
    """The units of this rank in the order in which they are reduced and published, which all ranks share."""

    def __init__(
        self, parameters: Mapping[str, UnitParameters], mesh: Mesh, options: UnitOptions, sink: GradSink
    ) -> None:
        self.options = options
        self.parameters = dict(parameters)
        self.units = {
            name: FlatUnit(name, unit.declared, mesh, options, tied=mesh.tied if unit.is_tied else None)
            for name, unit in parameters.items()
        }
        for unit in self.units.values():
            unit.bind(sink)

    @property
    def pieces(self) -> list[Piece]:
        """What the optimizer updates."""
        return [piece for unit in self.units.values() for piece in unit.pieces]

    def begin_step(self, num_microbatches: int) -> None:
        """Expect the gradients of this many micro-batches."""
        for name, unit in self.units.items():
            unit.expect(self.parameters[name].contributions * num_microbatches)

    def reduce_stage(self, stage: int) -> None:
        """Start the reductions of a stage whose backwards are done, but for units that other stages still use; those of
        tied tables wait for `finish_reduce`."""
        for name, unit in self.units.items():
            if stage in self.parameters[name].stages and unit.tied is None and unit.is_complete:
                unit.start_reduce()

    def finish_reduce(self) -> None:
        """Wait until every unit's gradients are added up over all ranks."""
        for unit in self.units.values():
            unit.start_reduce()
        for unit in self.units.values():
            unit.finish_reduce()

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

    def publish(self) -> None:
        """Bring the updated master weights to the layers of every rank."""
        pending = [unit.start_publish() for unit in self.units.values()]
        for one in pending:
            one.wait()

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
        """Bytes of weights, gradients and separate master weights, as allocated."""

        def total(tensors: list[Tensor]) -> int:
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

        units = list(self.units.values())
        separate = [unit.master for unit in units if unit.master.dtype != self.options.param_dtype]
        return StateBytes(total([u.weights for u in units]), total([u.grads for u in units]), total(separate))
