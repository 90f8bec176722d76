"""Muon: momentum whose update is an orthogonalised matrix, for the matrices inside a transformer.

    m <- b m + (1 - b) g;  u = m, or with Nesterov b m + (1 - b) g;  w <- w - lr (decay w + scale orthogonal(u))

The momentum lies where the weights lie. For the orthogonalisation each matrix is put together whole on one of the ranks
that share it, so the update is the same at every layout. Fused parts (query, key, value; gate, up) are matrices of
their own. Tables, biases and norms are left to another optimizer (`build.py`).

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al. 2025 (Moonlight) for decay and scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.flat import FlatOptimizer, ParameterUpdate, chunks
from megatron3d.optim.newton_schulz import COEFFICIENTS, orthogonalize, update_scale
from megatron3d.params.owned_slice import FullAccess
from megatron3d.params.spec import ParamSpec

PRODUCT_DTYPES = {"low": torch.bfloat16, "medium": torch.bfloat16, "high": torch.float32}


class Muon(FlatOptimizer):
    """Muon over flat parameters that hold hidden matrices and nothing else."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, full: FullAccess) -> None:
        self.full = full
        super().__init__(groups, config)

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The momentum, fp32."""
        return {"momentum_buffer": torch.zeros_like(parameter)}

    def update(self, updates: Sequence[ParameterUpdate]) -> None:
        """Momentum in place of the gradients, orthogonalised in place, then one step."""
        for one in updates:
            for chunk in chunks(one.value):
                self._to_momentum(one, chunk)
        grads = {one.parameter: one.grad for one in updates}
        owned_slices = [owned for owned in self.full.owned_slices() if owned.spec.is_hidden_matrix]
        nothing = torch.zeros(0)
        values = [nothing if p.flat is None else grads[p.flat][p.within] for p in owned_slices]
        self.full.map_full(owned_slices, values, self.orthogonal)
        for one in updates:
            one.value.mul_(1.0 - one.lr * one.weight_decay).add_(one.grad, alpha=-one.lr)

    def _to_momentum(self, one: ParameterUpdate, chunk: slice) -> None:
        beta, grad, momentum = self.config.muon_momentum, one.grad[chunk], one.state["momentum_buffer"][chunk]
        momentum.lerp_(grad, 1.0 - beta)
        if self.config.muon_nesterov:
            grad.lerp_(momentum, beta)
        else:
            grad.copy_(momentum)

    def orthogonal(self, spec: ParamSpec, matrix: Tensor) -> Tensor:
        """The scaled orthogonal factor of a whole matrix, of each fused part by itself."""
        config = self.config
        parts = spec.parts if spec.parts and config.muon_split_qkv else (spec.shape[0],)
        return torch.cat(
            [
                orthogonalize(
                    part,
                    coefficients=COEFFICIENTS[config.muon_coefficient_type],
                    num_steps=config.muon_num_ns_steps,
                    dtype=PRODUCT_DTYPES[config.muon_fp32_matmul_prec],
                )
                * (config.muon_extra_scale_factor * update_scale(part.shape[0], part.shape[1], config.muon_scale_mode))
                for part in matrix.split(parts)
            ]
        )
