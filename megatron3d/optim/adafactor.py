"""Adafactor: Adam's second moment of a matrix as the product of one number per row and one per column, no first moment.

    R <- R + t^-0.8 (mean of G^2 over columns - R), C likewise over rows;  V = R C / mean(R);  U = G / sqrt(V)
    w <- w - lr decay w - max(eps2, rms(w)) min(lr, 1 / sqrt(t)) U / max(1, rms(U))

These are the formulas and constants of `torch.optim.Adafactor`, over whole parameters. The sums over rows, columns and
whole parameters are added up over the ranks in two exchanges of a few numbers; R and C are on every rank that holds a
part of the matrix. Vectors keep the second moment of each element.

Source: Shazeer and Stern 2018, algorithms 4 and 5; torch's documentation says how its learning rate and eps differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.flat import Due, FlatOptimizer
from megatron3d.optim.norms import squared_norm
from megatron3d.params.boxes import Box, ShardView
from megatron3d.params.portion import Portion, Whole

BETA2_DECAY = -0.8
EPS1 = torch.finfo(torch.float32).eps
EPS2 = 1e-3


class Adafactor(FlatOptimizer):
    """Adafactor over pieces, with `row_var`, `col_var` of a piece's matrices and `variance` of its vectors."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, whole: Whole) -> None:
        self.config, self.whole = config, whole
        self._held = [portion for portion in whole.portions() if portion.piece is not None]
        self._state_at: dict[str, dict[str, slice]] = {}
        self._state_size: dict[nn.Parameter, dict[str, int]] = {}
        for portion in self._held:
            assert portion.piece is not None, f"{portion.spec.name} is not held"
            sizes = self._state_size.setdefault(portion.piece, {})
            places = self._state_at[portion.spec.name] = {}
            for name, size in _state_sizes(portion).items():
                start = sizes.get(name, 0)
                places[name], sizes[name] = slice(start, start + size), start + size
        super().__init__(groups)

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The factors of all matrices of a piece one after another, and the moments of its vectors."""
        return {name: parameter.new_zeros(size) for name, size in self._state_size[parameter].items()}

    def state_views(self, *, with_copies: bool) -> dict[str, ShardView]:
        """What a checkpoint stores, by kind of state and parameter; a factor is held whole."""
        views = {}
        for portion in self._held:
            if portion.spec.tied_copy and not with_copies:
                continue
            for name, values in self._states(portion).items():
                view = ShardView((values.numel(),), (Box((0,), (values.numel(),)),), values)
                if name == "variance":
                    boxes, covered = portion.boxes()
                    view = ShardView(portion.spec.shape, boxes, values[:covered])
                views[f"{name}/{portion.spec.name}"] = view
        return views

    def _states(self, portion: Portion) -> dict[str, Tensor]:
        assert portion.piece is not None, f"{portion.spec.name} is not held"
        state = self.state[portion.piece]
        return {name: state[name][at] for name, at in self._state_at[portion.spec.name].items()}

    def update(self, due: Sequence[Due]) -> None:
        """Sums over rows, columns and parameters; directions in place of the gradients; their norms; one step."""
        by_piece = {one.parameter: one for one in due}
        portions = self.whole.portions()
        if not portions:
            return
        device = due[0].value.device if due else None
        shares = torch.zeros(sum(_num_sums(p) for p in portions), dtype=torch.float64, device=device)
        sums = shares.split([_num_sums(portion) for portion in portions])
        for portion, own in zip(portions, sums, strict=True):
            if portion.piece is not None and portion.counts:
                _fill_sums(own, portion, by_piece[portion.piece])
        sums = self.whole.add_up(sums)
        squares = torch.zeros(len(portions), dtype=torch.float64, device=device)
        for number, (portion, own) in enumerate(zip(portions, sums, strict=True)):
            if portion.piece is not None:
                one = by_piece[portion.piece]
                self._to_direction(portion, one, own)
                if portion.counts:
                    squares[number] = squared_norm(one.grad[portion.within])
        weights = torch.stack([own[-1] for own in sums]).tolist()
        norms = torch.stack(self.whole.add_up([*squares])).tolist()
        for portion, weight, square in zip(portions, weights, norms, strict=True):
            if portion.piece is not None:
                _apply(portion, by_piece[portion.piece], weight, square)

    def _to_direction(self, portion: Portion, one: Due, sums: Tensor) -> None:
        """G / sqrt(V) in place of G, after the moments have moved on."""
        states, grad, share = self._states(portion), one.grad[portion.within], one.count**BETA2_DECAY
        if "variance" in states:
            variance = states["variance"].lerp_(grad.square(), share)
            grad.mul_(variance.clamp(min=EPS1 * EPS1).rsqrt_())
            return
        rows, columns = portion.spec.shape
        row_var, col_var = states["row_var"], states["col_var"]
        row_var.lerp_((sums[:rows] / columns).float(), share)
        col_var.lerp_((sums[rows:-1] / rows).float(), share)
        block = _block_of(portion, device=grad.device)
        scaled = row_var[block.rows] / row_var.mean().clamp(min=EPS1)
        variance = torch.outer(scaled, col_var[block.columns])
        inside = variance.clamp_(min=EPS1 * EPS1).rsqrt_().flatten()[block.before :]
        covered = min(portion.length, inside.numel())
        grad[:covered].mul_(inside[:covered])


@dataclass(frozen=True)
class _Block:
    """The rows of the local shard that a portion touches: which rows and columns of the whole matrix they are, and how
    many elements of the first row come before the portion. Padding rows are left out."""

    rows: Tensor
    columns: Tensor
    before: int


def _block_of(portion: Portion, *, device: torch.device) -> _Block:
    spec = portion.spec
    width = spec.local_shape(portion.tp)[1]
    rows, columns = (_numbers(portion, dim).to(device) for dim in (0, 1))
    first, last = portion.start // width, -(-portion.stop // width)
    return _Block(rows[first:last], columns, portion.start - first * width)


def _numbers(portion: Portion, dim: int) -> Tensor:
    """The numbers in the whole matrix of a local shard's rows (dim 0) or columns (dim 1)."""
    spec = portion.spec
    if dim != spec.tp_dim:
        return torch.arange(spec.shape[dim])
    return torch.cat([torch.arange(low, high) for low, high in spec.cuts(portion.tp, portion.tp_rank)])


def _is_factored(portion: Portion) -> bool:
    return len(portion.spec.shape) == 2


def _state_sizes(portion: Portion) -> dict[str, int]:
    if _is_factored(portion):
        return {"row_var": portion.spec.shape[0], "col_var": portion.spec.shape[1]}
    return {"variance": portion.length}


def _num_sums(portion: Portion) -> int:
    """Squares of the gradient by row and by column where it is a matrix, and of all weights."""
    return (sum(portion.spec.shape) if _is_factored(portion) else 0) + 1


def _fill_sums(sums: Tensor, portion: Portion, one: Due) -> None:
    """This rank's share of the sums of a parameter."""
    sums[-1] = squared_norm(one.value[portion.within])
    if _is_factored(portion):
        rows, block = portion.spec.shape[0], _block_of(portion, device=one.grad.device)
        squares = one.grad.new_zeros(block.rows.numel(), block.columns.numel())
        inside = squares.flatten()[block.before :]
        covered = min(portion.length, inside.numel())
        torch.square(one.grad[portion.within][:covered], out=inside[:covered])
        sums[:rows].index_add_(0, block.rows, squares.sum(1).double())
        sums[rows:-1].index_add_(0, block.columns, squares.sum(0).double())


def _apply(portion: Portion, one: Due, weight_square: float, update_square: float) -> None:
    """One step, from the squared norms of the whole parameter and of its whole direction."""
    root = math.sqrt(portion.spec.numel)
    rate = max(EPS2, math.sqrt(weight_square) / root) * min(one.lr, one.count**-0.5)
    value = one.value[portion.within]
    value.mul_(1.0 - one.lr * one.weight_decay)
    value.add_(one.grad[portion.within], alpha=-rate / max(1.0, math.sqrt(update_square) / root))
