"""Norms of long fp32 tensors that do not lose small terms."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements whose squares one norm adds up in fp32: on the CPU torch adds them one after another, which over 10^8
# elements comes out percents too small, and over this many is exact to 1e-7.
NORM_CHUNK = 1 << 12


def squared_norm(tensor: Tensor) -> Tensor:
    """The sum of squares of a flat tensor, fp64 scalar."""
    in_rows = tensor.numel() - tensor.numel() % NORM_CHUNK
    rows, rest = tensor[:in_rows].view(-1, NORM_CHUNK), tensor[in_rows:]
    total = torch.linalg.vector_norm(rest).double().square()
    return total + torch.linalg.vector_norm(rows, dim=1).double().square().sum() if in_rows else total
