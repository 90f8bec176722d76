"""The three products of a linear layer, through torch's own library (MKL) or, in fp32 on a CPU, through oneDNN.

    y = x W^T + b        dx = g W        dW += g^T x

torch multiplies fp32 matrices on a CPU with the library that it was built with, mostly MKL, which is fast on Intel's
processors and can be slow on others. oneDNN comes with torch too, and is reached by the operator that torch's compiler
uses. It reads a second operand that is dense or a transposed view of a dense one as it lies, so no weight is copied;
the first must be dense. The weight gradient therefore transposes its narrower operand, x or g, and makes its product
by blocks of rows, since the operator cannot add to a buffer.

"onednn" is taken for fp32 on a CPU (and on the meta device, where memory is counted); all else is torch's whatever is
asked for. No function here is differentiable: the layers have a backward of their own (`tensor/linear.py`).

Shapes: T tokens, I input and O output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d_kernels.launch import KernelError

TORCH, ONEDNN = "torch", "onednn"
LIBRARIES = (TORCH, ONEDNN)

_BLOCK_ELEMENTS = 1 << 20
"""Of the weight gradient that are made at once (4 MiB), which then lie in a cache while they are added."""
_LEAST_ROWS = 64
"""Rows of a block, however wide: with fewer the time goes into reading the other operand again."""


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN."""
    return torch.backends.mkldnn.is_available()


def require_library(library: str) -> str:
    """The library if it is one that can be used here; raises KernelError if it is not."""
    if library not in LIBRARIES:
        raise KernelError(f"There is no library {library!r} for products; use one of {', '.join(LIBRARIES)}.")
    if library == ONEDNN and not has_onednn():
        raise KernelError("Products through 'onednn' need a torch that is built with oneDNN; use 'torch'.")
    return library


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, library: str = TORCH) -> Tensor:
    """x W^T + b, [..., O] from x [..., I]."""
    if not _takes_onednn(library, x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    return _onednn(x, weight_OI, bias_O)


def input_gradient(grad_out: Tensor, weight_OI: Tensor, *, library: str = TORCH) -> Tensor:
    """g W, [..., I] from the gradient of the output [..., O]."""
    if not _takes_onednn(library, grad_out, weight_OI):
        return grad_out @ weight_OI
    return _onednn(grad_out, weight_OI.contiguous().t(), None)


def weight_gradient(grad_TO: Tensor, x_TI: Tensor, *, library: str = TORCH) -> Tensor:
    """g^T x, [O, I]."""
    if not _takes_onednn(library, grad_TO, x_TI):
        return grad_TO.t() @ x_TI
    product_OI = grad_TO.new_zeros(grad_TO.shape[1], x_TI.shape[1])
    add_weight_gradient(product_OI, grad_TO, x_TI, library=library)
    return product_OI


def add_weight_gradient(buffer_OI: Tensor, grad_TO: Tensor, x_TI: Tensor, *, library: str = TORCH) -> None:
    """buffer += g^T x, without a temporary of the buffer's size. All of one dtype."""
    if not _takes_onednn(library, buffer_OI, grad_TO, x_TI):
        buffer_OI.addmm_(grad_TO.t(), x_TI)
    elif grad_TO.shape[1] > x_TI.shape[1]:
        _add_by_blocks(buffer_OI.t(), x_TI, grad_TO)
    else:
        _add_by_blocks(buffer_OI, grad_TO, x_TI)


def _add_by_blocks(buffer_NW: Tensor, narrow_TN: Tensor, wide_TW: Tensor) -> None:
    """buffer += narrow^T wide; the copy is of the size of the narrow operand."""
    narrow_NT, wide_WT = narrow_TN.t().contiguous(), wide_TW.contiguous().t()
    rows = max(_LEAST_ROWS, _BLOCK_ELEMENTS // wide_WT.shape[0])
    for first in range(0, narrow_NT.shape[0], rows):
        buffer_NW[first : first + rows].add_(_onednn(narrow_NT[first : first + rows], wide_WT, None))


def _takes_onednn(library: str, *operands: Tensor) -> bool:
    """Whether oneDNN can and should multiply these; it refuses operands without elements."""
    return library == ONEDNN and all(
        one.dtype == torch.float32 and one.device.type in ("cpu", "meta") and one.numel() > 0 for one in operands
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias; `weight` is dense or the transposed view of a dense matrix, other strides are copied."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    rows = x.contiguous().view(-1, x.shape[-1])
    y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    # As torch's own products do it: autograd would take a view for one that the caller may not write to.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
