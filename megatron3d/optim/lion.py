"""Lion: the sign of a blend of momentum and gradient.

    c = b1 m + (1 - b1) g;  w <- w - lr (sign(c) + decay w);  m <- b2 m + (1 - b2) g

One moment, half of Adam's state. Every element moves by the learning rate, so rates are three to ten times smaller than
Adam's and decays larger by the same factor.

Source: Chen et al. 2023 (Symbolic Discovery of Optimization Algorithms), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron3d.optim.flat import FlatOptimizer, ParameterUpdate, chunks
from megatron3d.optim.moments import MOMENT_DTYPES, read_moment, write_moment


class Lion(FlatOptimizer):
    """Lion with its moment in the dtype of `--exp-avg-dtype`."""

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The momentum."""
        return {"exp_avg": torch.zeros_like(parameter, dtype=MOMENT_DTYPES[self.config.exp_avg_dtype])}

    def update(self, updates: Sequence[ParameterUpdate]) -> None:
        """Elementwise, chunk by chunk."""
        beta1, beta2 = self.config.lion_beta1, self.config.lion_beta2
        for one in updates:
            for chunk in chunks(one.value):
                value, grad, stored = one.value[chunk], one.grad[chunk], one.state["exp_avg"][chunk]
                moment = read_moment(stored)
                direction = torch.lerp(moment, grad, 1.0 - beta1).sign_()
                value.mul_(1.0 - one.lr * one.weight_decay).add_(direction, alpha=-one.lr)
                write_moment(stored, moment.lerp_(grad, 1.0 - beta2), count=one.count)
