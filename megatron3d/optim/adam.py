"""Adam with moments in bf16; with fp32 moments torch's own fused optimizer does the same in one pass.

Each chunk of a parameter takes torch's fused update in fp32 and puts its moments back in their own dtype.

Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019 (AdamW), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.flat import FlatOptimizer, ParameterUpdate, chunks
from megatron3d.optim.moments import MOMENT_DTYPES, read_moment, write_moment


class AdamOfMoments(FlatOptimizer):
    """Adam whose moments have the dtypes of `--exp-avg-dtype` and `--exp-avg-sq-dtype`."""

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Both moments."""
        return new_moments(parameter, self.config)

    def update(self, updates: Sequence[ParameterUpdate]) -> None:
        """Elementwise, chunk by chunk."""
        for one in updates:
            for chunk in chunks(one.value):
                self._update(one, chunk)

    def _update(self, one: ParameterUpdate, chunk: slice) -> None:
        stored = (one.state["exp_avg"][chunk], one.state["exp_avg_sq"][chunk])
        moments = [read_moment(moment) for moment in stored]
        adam(
            [one.value[chunk]],
            [one.grad[chunk]],
            [moments[0]],
            [moments[1]],
            [],
            [torch.tensor(one.count - 1.0, device=one.value.device)],
            fused=True,
            decoupled_weight_decay=self.config.decoupled_weight_decay,
            amsgrad=False,
            beta1=self.config.adam_beta1,
            beta2=self.config.adam_beta2,
            lr=one.lr,
            weight_decay=one.weight_decay,
            eps=self.config.adam_eps,
            maximize=False,
        )
        for moment, values in zip(stored, moments, strict=True):
            write_moment(moment, values, count=one.count)


def new_moments(parameter: nn.Parameter, config: OptimConfig) -> dict[str, Tensor]:
    """Zeros for both moments of Adam, in their dtypes."""
    return {
        "exp_avg": torch.zeros_like(parameter, dtype=MOMENT_DTYPES[config.exp_avg_dtype]),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=MOMENT_DTYPES[config.exp_avg_sq_dtype]),
    }
