"""The products of many linear layers of one shape, each with rows of its own: the experts of a mixture.

    y[rows of e] = x[rows of e] W_e^T + b_e        dx[rows of e] = g[rows of e] W_e

The rows of a layer lie together, those of the first layer first. Each layer's rows are multiplied by themselves, by the
library that multiplies all else (`products.py`), into one result: torch's grouped product on a CPU does the same. A
layer without rows multiplies nothing. No function here is differentiable: the layers have a backward of their own.

Shapes: R rows of all layers, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron3d_kernels import products


def grouped_linear(
    x_RI: Tensor,
    weights_OI: Sequence[Tensor],
    biases_O: Sequence[Tensor | None],
    counts: Sequence[int],
    *,
    library: str = products.TORCH,
) -> Tensor:
    """x W_e^T + b_e for the rows of each layer, [R, O]; `counts` has the rows of each."""
    y_RO = x_RI.new_empty(x_RI.shape[0], weights_OI[0].shape[0])
    for number, rows in _stretches(counts):
        weight, bias = weights_OI[number], biases_O[number]
        if library != products.TORCH:
            y_RO[rows] = products.linear(x_RI[rows], weight, bias, library=library)
        elif bias is None:
            torch.mm(x_RI[rows], weight.t(), out=y_RO[rows])
        else:
            torch.addmm(bias, x_RI[rows], weight.t(), out=y_RO[rows])
    return y_RO


def grouped_input_gradient(
    grad_RO: Tensor, weights_OI: Sequence[Tensor], counts: Sequence[int], *, library: str = products.TORCH
) -> Tensor:
    """g W_e for the rows of each layer, [R, I]."""
    grad_RI = grad_RO.new_empty(grad_RO.shape[0], weights_OI[0].shape[1])
    for number, rows in _stretches(counts):
        if library != products.TORCH:
            grad_RI[rows] = products.input_gradient(grad_RO[rows], weights_OI[number], library=library)
        else:
            torch.mm(grad_RO[rows], weights_OI[number], out=grad_RI[rows])
    return grad_RI


def _stretches(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Number and rows of each layer that has some."""
    first = 0
    for number, count in enumerate(counts):
        if count:
            yield number, slice(first, first + count)
        first += count
