"""ModuleStates: the declared state of a rank's modules in memory, its update after a step, and what checkpoints store.

Every data-parallel rank holds the same values and makes the same update of them, from totals that are reduced over the
ranks that read different samples. So state needs no message of its own but that of the totals, all in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from megatron3d.comm.collectives import all_reduce
from megatron3d.comm.mesh import Axis, Mesh
from megatron3d.params.boxes import ShardView
from megatron3d.params.module import ParallelModule, declared_states, materialize_state, stateful_modules
from megatron3d.params.state import Reduction


class ModuleStates:
    """The state of modules on one rank; state beside parameters is with the flat units."""

    def __init__(self, stages: Iterable[nn.Module], mesh: Mesh, device: torch.device, *, seed: int) -> None:
        """Give the declared state of the stages memory and its first values, and totals theirs, which is 0."""
        stages = list(stages)
        self._mesh = mesh
        self._modules = list(stateful_modules(stages).values())
        self._declared = declared_states(stages)
        for one in self._declared.values():
            materialize_state(one, seed=seed, tp=mesh.tp.size, tp_rank=mesh.tp.rank, device=device)
        for module, name in self._totals():
            total = module.get_buffer(name)
            module.register_buffer(name, torch.zeros(total.shape, dtype=total.dtype, device=device), persistent=False)

    def _totals(self) -> Iterator[tuple[ParallelModule, str]]:
        return ((module, name) for module in self._modules for name in module.total_specs)

    @property
    def size_bytes(self) -> int:
        """Bytes of state and totals."""
        totals = [module.get_buffer(name) for module, name in self._totals()]
        return sum(one.numel() * one.element_size() for one in (*self.values().values(), *totals))

    def values(self) -> dict[str, Tensor]:
        """The live tensors, in their local shapes, by full name."""
        return {name: one.owner.get_buffer(one.attribute) for name, one in self._declared.items()}

    def views(self) -> dict[str, ShardView]:
        """What checkpoints store beside the weights, by full name; ranks that hold the same offer the same."""
        tp = self._mesh.tp
        return {
            name: ShardView(cut.shape, cut.boxes(tp.size, tp.rank, 0, value.numel())[0], value.view(-1))
            for name, value in self.values().items()
            for cut in [self._declared[name].spec.cut]
        }

    def may_be_missing(self, name: str) -> bool:
        """Whether a checkpoint may lack the state of this full name, which then keeps its first values."""
        return name in self._declared and self._declared[name].spec.may_be_missing

    def replicated(self) -> list[tuple[Axis, dict[str, Tensor]]]:
        """The values that all ranks of an axis hold alike, for `require_equal_replicas`."""
        replicated = {
            name: value for name, value in self.values().items() if self._declared[name].spec.cut.is_replicated
        }
        return [(self._mesh.grad, self.values()), (self._mesh.tp, replicated)]

    @torch.no_grad()
    def reduce_totals(self) -> None:
        """Reduce the totals of the step; collective over the ranks that hold the same stages."""
        for reduction in ("sum", "max"):
            self._reduce(reduction)

    @torch.no_grad()
    def update(self) -> None:
        """Let every module update its state, after the totals have been reduced."""
        for module in self._modules:
            if module.has_counted or not module.total_specs:
                module.update_state()

    def _reduce(self, reduction: Reduction) -> None:
        mine = [
            (m, name, m.total_specs[name]) for m, name in self._totals() if m.total_specs[name].reduction == reduction
        ]
        for axis, names in (
            (self._mesh.tp, [(module, name) for module, name, spec in mine if spec.is_partial]),
            (self._mesh.grad, [(module, name) for module, name, _ in mine]),
        ):
            buffers = [module.get_buffer(name) for module, name in names]
            if buffers and axis.size > 1:
                reduced = all_reduce(torch.cat([one.flatten() for one in buffers]), axis, reduction=reduction)
                for one, part in zip(buffers, reduced.split([one.numel() for one in buffers]), strict=True):
                    one.copy_(part.view_as(one))

    def clear_totals(self) -> None:
        """Start counting anew, for a step that begins."""
        for module in self._modules:
            module.clear_totals()
