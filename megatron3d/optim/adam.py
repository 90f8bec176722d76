"""Adam: torch's fused update, of fp32 moments in one pass and of bf16 ones chunk by chunk.

Each chunk of a parameter with bf16 moments takes the update in fp32 and stores its moments in their own dtype. With
fp32 moments this is what `torch.optim.Adam` does, which imports torch's compiler at its first step (see `flat.py`).

Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019 (AdamW), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.flat import FlatOptimizer, ParameterUpdate, by_rates, chunks
from megatron3d.optim.moments import MOMENT_DTYPES, read_moment, write_moment


class FusedAdam(FlatOptimizer):
    """Adam whose moments have the dtypes of `--exp-avg-dtype` and `--exp-avg-sq-dtype`."""

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Both moments."""
        return new_moments(parameter, self.config)

    def update(self, updates: Sequence[ParameterUpdate]) -> None:
        """Elementwise: all parameters with the same rates at once, or chunk by chunk."""
        if "bf16" in (self.config.exp_avg_dtype, self.config.exp_avg_sq_dtype):
            for one in updates:
                for chunk in chunks(one.value):
                    self._update_chunk(one, chunk)
            return
        for alike in by_rates(updates):
            moments = [(one.state["exp_avg"], one.state["exp_avg_sq"]) for one in alike]
            self._update(alike, moments, slice(None))

    def _update_chunk(self, one: ParameterUpdate, chunk: slice) -> None:
        stored = one.state["exp_avg"][chunk], one.state["exp_avg_sq"][chunk]
        moments = read_moment(stored[0]), read_moment(stored[1])
        self._update([one], [moments], chunk)
        for moment, values in zip(stored, moments, strict=True):
            write_moment(moment, values, count=one.count)

    def _update(self, alike: Sequence[ParameterUpdate], moments: list[tuple[Tensor, Tensor]], within: slice) -> None:
        """Update a range of each of the parameters, which have the same rates and count, and their fp32 moments."""
        first = alike[0]
        # A number of its own for each, which torch adds 1 to; on a GPU one kernel writes them and nothing waits.
        counts = torch.full((len(alike),), first.count - 1.0, dtype=torch.float32, device=first.value.device)
        adam(
            [one.value[within] for one in alike],
            [one.grad[within] for one in alike],
            [moment for moment, _ in moments],
            [square for _, square in moments],
            [],
            list(counts.unbind()),
            fused=True,
            decoupled_weight_decay=self.config.decoupled_weight_decay,
            amsgrad=False,
            beta1=self.config.adam_beta1,
            beta2=self.config.adam_beta2,
            lr=first.lr,
            weight_decay=first.weight_decay,
            eps=self.config.adam_eps,
            maximize=False,
        )


def new_moments(parameter: nn.Parameter, config: OptimConfig) -> dict[str, Tensor]:
    """Zeros for both moments of Adam, in their dtypes."""
    return {
        "exp_avg": torch.zeros_like(parameter, dtype=MOMENT_DTYPES[config.exp_avg_dtype]),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=MOMENT_DTYPES[config.exp_avg_sq_dtype]),
    }
