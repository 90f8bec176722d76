"""Norms of long fp32 tensors that do not lose small terms.

A GPU adds up in a tree, which loses nothing and wants few long tensors; a CPU one after another, in short ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements whose squares one norm adds up in fp32: on the CPU torch adds them one after another, which over 10^8
# elements comes out percents too small, and over this many is exact to 1e-7.
NORM_CHUNK = 1 << 12
_AT_ONCE = 1 << 24  # elements whose norms of chunks are in memory together


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of flat tensors on a device, fp64 scalar; on a GPU by kernels over all of them at once."""
    if device.type != "cpu" and tensors:
        return torch.nn.utils.get_total_norm(tensors).double().square()
    return sum((squared_norm(one) for one in tensors), torch.zeros((), dtype=torch.float64, device=device))


def squared_norm(tensor: Tensor) -> Tensor:
    """The sum of squares of a flat tensor, fp64 scalar."""
    if tensor.device.type != "cpu":
        return torch.linalg.vector_norm(tensor).double().square()
    total = _squared_norm(tensor[:_AT_ONCE])
    for first in range(_AT_ONCE, tensor.numel(), _AT_ONCE):
        total += _squared_norm(tensor[first : first + _AT_ONCE])
    return total


def _squared_norm(tensor: Tensor) -> Tensor:
    in_rows = tensor.numel() - tensor.numel() % NORM_CHUNK
    rows, rest = tensor[:in_rows].view(-1, NORM_CHUNK), tensor[in_rows:]
    total = torch.linalg.vector_norm(rest).double().square()
    return total + torch.linalg.vector_norm(rows, dim=1).double().square().sum() if in_rows else total
