"""Norms of long fp32 tensors that do not lose small terms."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements whose squares one norm adds up in fp32: on the CPU torch adds them one after another, which over 10^8
# elements comes out percents too small, and over this many is exact to 1e-6.
NORM_CHUNK = 1 << 16


def squared_norm(tensor: Tensor) -> Tensor:
    """The sum of squares of a flat tensor, fp64 scalar."""
    return torch.nn.utils.get_total_norm(tensor.split(NORM_CHUNK)).double().square()
