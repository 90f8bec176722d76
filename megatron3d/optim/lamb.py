"""LAMB: Adam's direction, scaled in each parameter by the ratio of two norms.

    r = m' / (sqrt(v') + eps) + decay w;  w <- w - lr (|w| / |r|) r

m' and v' are Adam's moments with bias correction. The norms are those of whole parameters, whichever ranks hold them:
their squares travel in one sum of two fp64 numbers for each parameter. As in the authors' code, parameters without
decay (biases and norms) are not scaled, nor are those whose weights or direction are all zero.

Source: You et al. 2020 (Large Batch Optimization for Deep Learning), algorithm 2, with phi the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.adam import new_moments
from megatron3d.optim.flat import FlatOptimizer, ParameterUpdate, chunks
from megatron3d.optim.moments import read_moment, write_moment
from megatron3d.params.norms import squared_norm
from megatron3d.params.owned_slice import FullAccess


class Lamb(FlatOptimizer):
    """LAMB with moments in the dtypes of `--exp-avg-dtype` and `--exp-avg-sq-dtype`."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, full: FullAccess) -> None:
        self.full = full
        super().__init__(groups, config)

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Both moments."""
        return new_moments(parameter, self.config)

    def update(self, updates: Sequence[ParameterUpdate]) -> None:
        """Directions in place of the gradients, then norms, then one step for each parameter."""
        for one in updates:
            for chunk in chunks(one.value):
                self._to_direction(one, chunk)
        by_parameter = {one.parameter: one for one in updates}
        held = [(p, by_parameter[p.flat]) for p in self.full.owned_slices() if p.flat is not None]
        for (owned, one), ratio in zip(held, self._trust_ratios(by_parameter), strict=True):
            one.value[owned.within].addcmul_(one.grad[owned.within], ratio, value=-one.lr)

    def _to_direction(self, one: ParameterUpdate, chunk: slice) -> None:
        config, value, grad = self.config, one.value[chunk], one.grad[chunk]
        stored = one.state["exp_avg"][chunk], one.state["exp_avg_sq"][chunk]
        moment, square = read_moment(stored[0]), read_moment(stored[1])
        moment.lerp_(grad, 1.0 - config.adam_beta1)
        square.mul_(config.adam_beta2).addcmul_(grad, grad, value=1.0 - config.adam_beta2)
        correction = 1.0 - config.adam_beta1**one.count, 1.0 - config.adam_beta2**one.count
        denominator = (square / correction[1]).sqrt_().add_(config.adam_eps)
        torch.div(moment, denominator, out=grad).div_(correction[0]).add_(value, alpha=one.weight_decay)
        write_moment(stored[0], moment, count=one.count)
        write_moment(stored[1], square, count=one.count)

    def _trust_ratios(self, by_parameter: dict[nn.Parameter, ParameterUpdate]) -> list[Tensor]:
        """|w| / |r| of each parameter of which this rank holds a part, fp32 scalars that stay on the device."""
        owned_slices = self.full.owned_slices()
        device = next(iter(by_parameter)).device if by_parameter else None
        squares = torch.zeros(len(owned_slices), 2, dtype=torch.float64, device=device)
        for row, owned in zip(squares, owned_slices, strict=True):
            if owned.flat is not None and owned.counts and owned.spec.decays:
                one = by_parameter[owned.flat]
                row[0], row[1] = (squared_norm(x[owned.within]) for x in (one.value, one.grad))
        if not owned_slices:
            return []
        weights, directions = torch.stack(self.full.sum_over_ranks([*squares])).unbind(1)
        has_ratio = (weights > 0.0) & (directions > 0.0)
        ratios = torch.where(has_ratio, weights / directions, 1.0).sqrt().float()
        return [one for one, owned in zip(ratios.unbind(), owned_slices, strict=True) if owned.flat is not None]
