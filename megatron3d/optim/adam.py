"""Adam: one update of all parameters with the same rates, by the kernel for their device (`megatron3d_kernels.adam`).

Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019 (AdamW), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron3d_kernels.adam import AdamStep, AdamTensors, adam
from megatron3d_kernels.selection import DEFAULT_SELECTION, Selection
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.flat import FlatOptimizer, ParameterUpdate, by_rates
from megatron3d.optim.moments import MOMENT_DTYPES


class FusedAdam(FlatOptimizer):
    """Adam whose moments have the dtypes of `--exp-avg-dtype` and `--exp-avg-sq-dtype`."""

    scales_gradients = True

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimConfig, *, kernels: Selection = DEFAULT_SELECTION
    ) -> None:
        """`kernels` picks the implementation."""
        self.kernels = kernels
        super().__init__(groups, config)

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Both moments."""
        return new_moments(parameter, self.config)

    def update(self, updates: Sequence[ParameterUpdate]) -> None:
        """Elementwise: all parameters with the same rates at once, and their copies."""
        config = self.config
        for alike in by_rates(updates):
            first = alike[0]
            step = AdamStep(
                lr=first.lr,
                weight_decay=first.weight_decay,
                beta1=config.adam_beta1,
                beta2=config.adam_beta2,
                eps=config.adam_eps,
                count=first.count,
                decoupled=config.decoupled_weight_decay,
                grad_scale=first.grad_scale,
            )
            adam([self._tensors(one) for one in alike], step, selection=self.kernels)

    def _tensors(self, one: ParameterUpdate) -> AdamTensors:
        moments = one.state["exp_avg"], one.state["exp_avg_sq"]
        return AdamTensors(one.value, one.grad, *moments, copy=self.copies.get(one.parameter))

    def publish(self, updates: Sequence[ParameterUpdate]) -> None:
        """Nothing: the update has written the copies."""


def new_moments(parameter: nn.Parameter, config: OptimConfig) -> dict[str, Tensor]:
    """Zeros for both moments of Adam, in their dtypes."""
    return {
        "exp_avg": torch.zeros_like(parameter, dtype=MOMENT_DTYPES[config.exp_avg_dtype]),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=MOMENT_DTYPES[config.exp_avg_sq_dtype]),
    }
