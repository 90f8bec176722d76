"""Gradient descent with momentum: torch's fused update of all parameters with the same rates at once.

    g <- g + decay w;  m <- b m + g;  w <- w - lr m

Source: as `torch.optim.SGD`, without dampening; that class imports torch's compiler at its first step (see `flat.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from megatron3d.optim.flat import FlatOptimizer, ParameterUpdate, by_rates

_OFF: Mapping[str, Any] = {"dampening": 0.0, "nesterov": False, "maximize": False}


class FusedSgd(FlatOptimizer):
    """Gradient descent with `--sgd-momentum`, or with none and then without state."""

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The momentum, fp32, if there is any."""
        return {"momentum_buffer": torch.zeros_like(parameter)} if self.config.sgd_momentum else {}

    def update(self, updates: Sequence[ParameterUpdate]) -> None:
        """Elementwise, in one pass."""
        coefficients = {
            **_OFF,
            "momentum": self.config.sgd_momentum,
        }
        for alike in by_rates(updates):
            sgd(
                [one.value for one in alike],
                [one.grad for one in alike],
                [one.state.get("momentum_buffer") for one in alike],
                fused=True,
                weight_decay=alike[0].weight_decay,
                lr=alike[0].lr,
                **coefficients,
            )
