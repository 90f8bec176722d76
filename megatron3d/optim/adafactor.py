"""Adafactor: Adam's second moment of a matrix as the product of one number per row and one per column, no first moment.

    R <- R + t^-0.8 (mean of G^2 over columns - R), C likewise over rows;  V = R C / mean(R);  U = G / sqrt(V)
    w <- w - lr decay w - max(eps2, rms(w)) min(lr, 1 / sqrt(t)) U / max(1, rms(U))

These are the formulas and constants of `torch.optim.Adafactor`, over whole parameters. The sums over rows, columns and
whole parameters are added up over the ranks in two exchanges of a few numbers; R and C are on every rank that holds a
part of the matrix. Vectors keep the second moment of each element.

Source: Shazeer and Stern 2018, algorithms 4 and 5; torch's documentation says how its learning rate and eps differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron3d_kernels.launch import sent
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.flat import FlatOptimizer, ParameterUpdate
from megatron3d.params.boxes import Box, ShardView
from megatron3d.params.norms import squared_norm
from megatron3d.params.owned_slice import FullAccess, OwnedSlice

BETA2_DECAY = -0.8
EPS1 = torch.finfo(torch.float32).eps
EPS2 = 1e-3


class Adafactor(FlatOptimizer):
    """Adafactor over flat parameters: `row_var` and `col_var` of the matrices in each, `variance` of the vectors."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, full: FullAccess) -> None:
        self.full = full
        self._held = [owned for owned in full.owned_slices() if owned.flat is not None]
        self._state_at: dict[str, dict[str, slice]] = {}
        self._state_size: dict[nn.Parameter, dict[str, int]] = {}
        for owned in self._held:
            assert owned.flat is not None, f"{owned.spec.name} is not held"
            sizes = self._state_size.setdefault(owned.flat, {})
            places = self._state_at[owned.spec.name] = {}
            for name, size in _state_sizes(owned).items():
                start = sizes.get(name, 0)
                places[name], sizes[name] = slice(start, start + size), start + size
        super().__init__(groups, config)

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The factors of all matrices of a flat parameter one after another, and the moments of its vectors."""
        return {name: parameter.new_zeros(size) for name, size in self._state_size[parameter].items()}

    def state_views(self, *, with_copies: bool) -> dict[str, ShardView]:
        """What a checkpoint stores, by kind of state and parameter; a factor is held whole."""
        views = {}
        for owned in self._held:
            if owned.spec.tied_copy and not with_copies:
                continue
            for name, values in self._states(owned).items():
                view = ShardView((values.numel(),), (Box((0,), (values.numel(),)),), values)
                if name == "variance":
                    boxes, covered = owned.boxes()
                    view = ShardView(owned.spec.shape, boxes, values[:covered])
                views[f"{name}/{owned.spec.name}"] = view
        return views

    def _states(self, owned: OwnedSlice) -> dict[str, Tensor]:
        assert owned.flat is not None, f"{owned.spec.name} is not held"
        state = self.state[owned.flat]
        return {name: state[name][at] for name, at in self._state_at[owned.spec.name].items()}

    def update(self, updates: Sequence[ParameterUpdate]) -> None:
        """Sums over rows, columns and parameters; directions in place of the gradients; their norms; one step."""
        by_parameter = {one.parameter: one for one in updates}
        owned_slices = self.full.owned_slices()
        if not owned_slices:
            return
        device = updates[0].value.device if updates else None
        shares = torch.zeros(sum(_num_sums(p) for p in owned_slices), dtype=torch.float64, device=device)
        sums = shares.split([_num_sums(owned) for owned in owned_slices])
        for owned, own in zip(owned_slices, sums, strict=True):
            if owned.flat is not None and owned.counts:
                _fill_sums(own, owned, by_parameter[owned.flat])
        sums = self.full.sum_over_ranks(sums)
        squares = torch.zeros(len(owned_slices), dtype=torch.float64, device=device)
        for number, (owned, own) in enumerate(zip(owned_slices, sums, strict=True)):
            if owned.flat is not None:
                one = by_parameter[owned.flat]
                self._to_direction(owned, one, own)
                if owned.counts:
                    squares[number] = squared_norm(one.grad[owned.within])
        weights, norms = [own[-1] for own in sums], self.full.sum_over_ranks([*squares])
        for owned, weight, square in zip(owned_slices, weights, norms, strict=True):
            if owned.flat is not None:
                _apply(owned, by_parameter[owned.flat], weight, square)

    def _to_direction(self, owned: OwnedSlice, one: ParameterUpdate, sums: Tensor) -> None:
        """G / sqrt(V) in place of G, after the moments have moved on."""
        states, grad, share = self._states(owned), one.grad[owned.within], one.count**BETA2_DECAY
        if "variance" in states:
            variance = states["variance"].lerp_(grad.square(), share)
            grad.mul_(variance.clamp(min=EPS1 * EPS1).rsqrt_())
            return
        rows, columns = owned.spec.shape
        row_var, col_var = states["row_var"], states["col_var"]
        row_var.lerp_((sums[:rows] / columns).float(), share)
        col_var.lerp_((sums[rows:-1] / rows).float(), share)
        block = _block_of(owned, device=grad.device)
        scaled = row_var[block.rows] / row_var.mean().clamp(min=EPS1)
        variance = torch.outer(scaled, col_var[block.columns])
        inside = variance.clamp_(min=EPS1 * EPS1).rsqrt_().flatten()[block.before :]
        covered = min(owned.length, inside.numel())
        grad[:covered].mul_(inside[:covered])


@dataclass(frozen=True)
class _Block:
    """The rows of the local shard that an owned slice touches: which rows and columns of the full matrix they are, and
    how many elements of the first row come before the slice. Padding rows are left out."""

    rows: Tensor
    columns: Tensor
    before: int


def _block_of(owned: OwnedSlice, *, device: torch.device) -> _Block:
    spec = owned.spec
    width = spec.local_shape(owned.tp)[1]
    rows, columns = (sent(_numbers(owned, dim), device) for dim in (0, 1))
    first, last = owned.start // width, -(-owned.stop // width)
    return _Block(rows[first:last], columns, owned.start - first * width)


def _numbers(owned: OwnedSlice, dim: int) -> Tensor:
    """The numbers in the whole matrix of a local shard's rows (dim 0) or columns (dim 1)."""
    spec = owned.spec
    if dim != spec.tp_dim:
        return torch.arange(spec.shape[dim])
    return torch.cat([torch.arange(low, high) for low, high in spec.cuts(owned.tp, owned.tp_rank)])


def _is_factored(owned: OwnedSlice) -> bool:
    return len(owned.spec.shape) == 2


def _state_sizes(owned: OwnedSlice) -> dict[str, int]:
    if _is_factored(owned):
        return {"row_var": owned.spec.shape[0], "col_var": owned.spec.shape[1]}
    return {"variance": owned.length}


def _num_sums(owned: OwnedSlice) -> int:
    """Squares of the gradient by row and by column where it is a matrix, and of all weights."""
    return (sum(owned.spec.shape) if _is_factored(owned) else 0) + 1


def _fill_sums(sums: Tensor, owned: OwnedSlice, one: ParameterUpdate) -> None:
    """This rank's share of the sums of a parameter."""
    sums[-1] = squared_norm(one.value[owned.within])
    if _is_factored(owned):
        rows, block = owned.spec.shape[0], _block_of(owned, device=one.grad.device)
        squares = one.grad.new_zeros(block.rows.numel(), block.columns.numel())
        inside = squares.flatten()[block.before :]
        covered = min(owned.length, inside.numel())
        torch.square(one.grad[owned.within][:covered], out=inside[:covered])
        sums[:rows].index_add_(0, block.rows, squares.sum(1).double())
        sums[rows:-1].index_add_(0, block.columns, squares.sum(0).double())


def _apply(owned: OwnedSlice, one: ParameterUpdate, weight_square: Tensor, update_square: Tensor) -> None:
    """One step, from the squared norms of the whole parameter and of its whole direction, which stay on the device."""
    numel = owned.spec.numel
    size = (weight_square / numel).sqrt().clamp_(min=EPS2)
    excess = (update_square / numel).sqrt().clamp_(min=1.0)
    rate = (size / excess).mul_(min(one.lr, one.count**-0.5)).float()
    value = one.value[owned.within]
    value.mul_(1.0 - one.lr * one.weight_decay)
    value.sub_(one.grad[owned.within].mul_(rate))
