"""Activations of the MLP that have one input: torch's own kernels, which are already a single pass over memory.

Gated activations, with two inputs, are in `gated_activation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F

from megatron3d_kernels.launch import KernelError


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2; source: So et al., "Primer" (2021), section 3."""
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "squared_relu": _squared_relu,
        "silu": F.silu,
    }
)
"""gelu is the exact one, x * (1 + erf(x / sqrt 2)) / 2; gelu_tanh is the approximation GPT-2 was trained with."""


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Apply the activation `kind` to x of any shape; torch computes in fp32 inside and returns the dtype of x.

    Raises KernelError for a kind that is not in ACTIVATIONS.
    """
    function = ACTIVATIONS.get(kind)
    if function is None:
        raise KernelError(f"The activation {kind!r} does not exist; use one of {', '.join(ACTIVATIONS)}.")
    return function(x)
