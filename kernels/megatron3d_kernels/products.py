"""The three products of a linear layer, through torch's own library (MKL) or, in fp32 on a CPU, through oneDNN.

    y = x W^T + b        dx = g W        dW += g^T x

torch multiplies fp32 matrices on a CPU with the library that it was built with, mostly MKL, which is fast on Intel's
processors and can be slow on others. oneDNN comes with torch too, and is reached by the operator that torch's compiler
uses. It reads a second operand that is dense or a transposed view of a dense one as it lies, so no weight is copied;
the first must be dense. The weight gradient therefore transposes its narrower operand, x or g, and makes its product
by blocks of rows, since the operator cannot add to a buffer.

"onednn" is taken for fp32 on a CPU (and on the meta device, where memory is counted); all else is torch's whatever is
asked for. No function here is differentiable: the layers have a backward of their own (`tensor/linear.py`).

torch itself multiplies bf16 on a CPU through oneDNN. Two of its calls cost more than they need to, so there bf16 goes
another way whatever the library: a bias is added inside of the product instead of being copied to every row of the
result first, and of a weight gradient the narrower operand is transposed before the product, not inside of it.

The weight gradient of bf16 and fp16 operands may be added to a buffer in fp32. On CUDA the product itself does that
(cuBLAS takes narrow operands and a wide result), so that nothing is rounded before the sum. Where a device or its torch
has no such product, as on CPUs, one in the dtype of the operands is made and then added.

Shapes: T tokens, I input and O output features.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d_kernels.launch import KernelError

TORCH, ONEDNN = "torch", "onednn"
LIBRARIES = (TORCH, ONEDNN)

_NARROW = (torch.bfloat16, torch.float16)
_BLOCK_ELEMENTS = 1 << 20
"""Of the weight gradient that are made at once (4 MiB), which then lie in a cache while they are added."""
_LEAST_ROWS = 64
"""Rows of a block, however wide: with fewer the time goes into reading the other operand again."""
_WORTH_A_COPY = 2
"""How many times wider one bf16 operand must be for a copy of the other to cost less than it saves; between operands
of one width it costs more."""


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
    if not _takes_onednn(library, x, weight_OI) and not (bias_O is not None and _is_bf16_on_cpu(x, weight_OI)):
        return F.linear(x, weight_OI, bias_O)
    return _onednn(x, weight_OI, bias_O)


def add_linear(onto: Tensor, x: Tensor, weight_OI: Tensor) -> None:
    """onto += x W^T for onto [..., O] without gaps, in the product, which rounds once."""
    onto.view(-1, len(weight_OI)).addmm_(x.reshape(-1, x.shape[-1]), weight_OI.t())


def input_gradient(grad_out: Tensor, weight_OI: Tensor, *, library: str = TORCH) -> Tensor:
    """g W, [..., I] from the gradient of the output [..., O]."""
    if not _takes_onednn(library, grad_out, weight_OI):
        return grad_out @ weight_OI
    return _onednn(grad_out, weight_OI.contiguous().t(), None)


def linear_into(
    y_RTO: Tensor, x_RTI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, library: str = TORCH
) -> None:
    """y = x W^T + b, written where y is: R blocks of T rows, which may lie apart in x and in y. Not for autograd."""
    if _takes_onednn(library, x_RTI, weight_OI) or (bias_O is not None and _is_bf16_on_cpu(x_RTI, weight_OI)):
        for y_TO, x_TI in zip(y_RTO, x_RTI, strict=True):
            y_TO.copy_(_onednn(x_TI, weight_OI, bias_O))
    else:
        _multiply_into(y_RTO, x_RTI, weight_OI.t(), bias_O)


def input_gradient_into(grad_x_RTI: Tensor, grad_RTO: Tensor, weight_OI: Tensor, *, library: str = TORCH) -> None:
    """g W, written where `grad_x` is; blocks of rows as in `linear_into`."""
    if _takes_onednn(library, grad_RTO, weight_OI):
        weight_IO = weight_OI.contiguous().t()
        for grad_x_TI, grad_TO in zip(grad_x_RTI, grad_RTO, strict=True):
            grad_x_TI.copy_(_onednn(grad_TO, weight_IO, None))
    else:
        _multiply_into(grad_x_RTI, grad_RTO, weight_OI, None)


def weight_gradient(grad_TO: Tensor, x_TI: Tensor, *, library: str = TORCH) -> Tensor:
    """g^T x, [O, I]; the transposed view of a dense matrix where that is made faster."""
    if _takes_onednn(library, grad_TO, x_TI):
        product_OI = grad_TO.new_empty(grad_TO.shape[1], x_TI.shape[1])
        add_weight_gradient(product_OI, grad_TO, x_TI, library=library, overwrites=True)
        return product_OI
    if _is_bf16_on_cpu(grad_TO, x_TI):
        outputs, inputs = grad_TO.shape[1], x_TI.shape[1]
        if outputs >= _WORTH_A_COPY * inputs:
            return (x_TI.t().contiguous() @ grad_TO).t()
        if inputs >= _WORTH_A_COPY * outputs:
            return grad_TO.t().contiguous() @ x_TI
    return grad_TO.t() @ x_TI


def add_weight_gradient(
    buffer_OI: Tensor, grad_TO: Tensor, x_TI: Tensor, *, library: str = TORCH, overwrites: bool = False
) -> None:
    """buffer += g^T x, or buffer = g^T x if it `overwrites`. There is a temporary of the buffer's size only where the
    operands have another dtype than the buffer and `adds_in_fp32` is False."""
    if buffer_OI.dtype != grad_TO.dtype:
        _add_to_other_dtype(buffer_OI, grad_TO, x_TI, library, overwrites)
    elif not _takes_onednn(library, buffer_OI, grad_TO, x_TI):
        if overwrites:
            torch.mm(grad_TO.t(), x_TI, out=buffer_OI)
        else:
            buffer_OI.addmm_(grad_TO.t(), x_TI)
    elif grad_TO.shape[1] > x_TI.shape[1]:
        _add_by_blocks(buffer_OI.t(), x_TI, grad_TO, overwrites)
    else:
        _add_by_blocks(buffer_OI, grad_TO, x_TI, overwrites)


def adds_in_fp32(device: torch.device) -> bool:
    """Whether products of bf16 and fp16 operands on this device are added to fp32 buffers without rounding first."""
    return device.type == "cuda" and _cuda_adds_in_fp32(device)


def add_in_fp32(buffer_OI: Tensor, grad_TO: Tensor, x_TI: Tensor, *, overwrites: bool = False) -> None:
    """buffer += g^T x, or =, in one product: the buffer in fp32, the operands both in bf16 or both in fp16."""
    if overwrites:
        torch.mm(grad_TO.t(), x_TI, out_dtype=torch.float32, out=buffer_OI)
    else:
        torch.addmm(buffer_OI, grad_TO.t(), x_TI, out_dtype=torch.float32, out=buffer_OI)


def describe_wide_sums() -> str:
    """A sentence for people: how weight gradients in bf16 and fp16 reach fp32 buffers on the devices that are here."""
    inside, apart = "inside of the product", "by a product that is rounded to their dtype and then added"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [torch.device("cpu"), *([] if accelerator is None else [torch.device(accelerator.type, 0)])]
    found = ", ".join(f"on {device.type} {inside if adds_in_fp32(device) else apart}" for device in devices)
    return f"weight gradients of bf16 and fp16 operands reach fp32 buffers {found}"


@cache
def _cuda_adds_in_fp32(device: torch.device) -> bool:
    """One small product of each kind, which torch refuses where it or the device's library lacks them."""
    buffer, operand = torch.zeros(8, 8, device=device), torch.ones(8, 8, device=device, dtype=torch.bfloat16)
    try:
        add_in_fp32(buffer, operand, operand, overwrites=True)
        add_in_fp32(buffer, operand, operand)
    except (RuntimeError, TypeError):
        return False
    return True


def _add_to_other_dtype(buffer_OI: Tensor, grad_TO: Tensor, x_TI: Tensor, library: str, overwrites: bool) -> None:
    is_wider = buffer_OI.dtype == torch.float32 and grad_TO.dtype in _NARROW and grad_TO.dtype == x_TI.dtype
    if is_wider and adds_in_fp32(buffer_OI.device):
        add_in_fp32(buffer_OI, grad_TO, x_TI, overwrites=overwrites)
        return
    product_OI = weight_gradient(grad_TO, x_TI, library=library)
    if overwrites:
        buffer_OI.copy_(product_OI)
    else:
        buffer_OI.add_(product_OI)


def _multiply_into(y_RTM: Tensor, x_RTK: Tensor, weight_KM: Tensor, bias_M: Tensor | None) -> None:
    """y = x W + b, block by block on a CPU, which would copy the weight for each, and for a single one, whose bias a
    GPU adds inside of the product."""
    if x_RTK.device.type != "cpu" and len(x_RTK) > 1:
        multiply_blocks(y_RTM, x_RTK, weight_KM, bias_M)
        return
    for y_TM, x_TK in zip(y_RTM, x_RTK, strict=True):
        if bias_M is None:
            torch.mm(x_TK, weight_KM, out=y_TM)
        else:
            torch.addmm(bias_M, x_TK, weight_KM, out=y_TM)


def multiply_blocks(y_RTM: Tensor, x_RTK: Tensor, weight_KM: Tensor, bias_M: Tensor | None) -> None:
    """y = x W + b for all blocks of rows by one kernel, which reads one weight for each."""
    weights_RKM = weight_KM.expand(len(x_RTK), *weight_KM.shape)
    if bias_M is None:
        torch.bmm(x_RTK, weights_RKM, out=y_RTM)
    else:
        torch.baddbmm(bias_M, x_RTK, weights_RKM, out=y_RTM)


def _add_by_blocks(buffer_NW: Tensor, narrow_TN: Tensor, wide_TW: Tensor, overwrites: bool) -> None:
    """buffer += narrow^T wide (or =); the copy is of the size of the narrow operand."""
    narrow_NT, wide_WT = narrow_TN.t().contiguous(), wide_TW.contiguous().t()
    rows = max(_LEAST_ROWS, _BLOCK_ELEMENTS // wide_WT.shape[0])
    put = Tensor.copy_ if overwrites else Tensor.add_
    for first in range(0, narrow_NT.shape[0], rows):
        put(buffer_NW[first : first + rows], _onednn(narrow_NT[first : first + rows], wide_WT, None))


def _takes_onednn(library: str, *operands: Tensor) -> bool:
    """Whether oneDNN can and should multiply these; it refuses operands without elements."""
    return library == ONEDNN and all(
        one.dtype == torch.float32 and one.device.type in ("cpu", "meta") and one.numel() > 0 for one in operands
    )


def _is_bf16_on_cpu(*operands: Tensor) -> bool:
    """Whether oneDNN multiplies these in bf16; not in a graph that is traced to run elsewhere."""
    if torch.compiler.is_compiling() or not _multiplies_bf16():
        return False
    return all(
        one.dtype == torch.bfloat16 and one.device.type in ("cpu", "meta") and one.numel() > 0 for one in operands
    )


@cache
def _multiplies_bf16() -> bool:
    """Whether oneDNN is there and has bf16 products for this processor."""
    return has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias; `weight` is dense or the transposed view of a dense matrix, other strides are copied."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    rows = x.contiguous().view(-1, x.shape[-1])
    y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    # As torch's own products do it: autograd would take a view for one that the caller may not write to.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
