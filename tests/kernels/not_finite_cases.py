"""What is not a number stays visible in every activation and norm, as cases like those of `kernel_cases.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron3d_kernels import Registry
from megatron3d_kernels.activation import ACTIVATIONS
from megatron3d_kernels.gated_activation import GATED_ACTIVATIONS
from torch import Tensor


def nan_stays_visible(device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """NaN in the first column is NaN in the first column of the result, whatever comparisons with zero say of it."""
    row = torch.tensor([[float("nan"), 1.0, -1.0, 2.0]], device=device, dtype=dtype)
    ones = torch.ones_like(row)
    results: dict[str, Tensor] = {kind: registry.activation(row, kind) for kind in ACTIVATIONS}
    for kind in GATED_ACTIVATIONS:
        results[f"{kind}, gate"] = registry.gated_activation(row, ones, kind)
        results[f"{kind}, up"] = registry.gated_activation(ones, row, kind)
        results[f"{kind}, halves"] = registry.fused_gated_activation(torch.cat([row, ones], -1), kind)
    for name, result in results.items():
        assert result.isnan().tolist() == [[True, False, False, False]], f"{name}: {result.tolist()}"
    for norm in (registry.rms_norm(row, ones[0]), registry.layer_norm(row, ones[0], ones[0])):
        assert bool(norm.isnan().all())


NOT_FINITE_CASES: dict[str, Callable[[torch.device, torch.dtype, Registry], None]] = {"nan": nan_stays_visible}
