"""What torch's CPU kernels take and release within one call, which no record of operations shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_ELEMENTWISE = torch.Tag.pointwise
_CASTS_ITS_OPERAND = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default})
_KEEPS_ITS_MASK = frozenset({torch.ops.aten.where.self, torch.ops.aten.masked_fill.Scalar})


def cpu_scratch(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """Bytes beside operands and results.

    An elementwise operation of operands of several dtypes first copies those that are not of the common dtype, and
    writes a result of another floating dtype through a copy too (ATen/native/TensorIterator.cpp, `compute_types`).
    The backward of fused attention collects the gradient of the queries in a buffer of its own.
    """
    if func is _FLASH_BACKWARD:
        return args[1].nbytes
    if _ELEMENTWISE not in func.tags or func in _CASTS_ITS_OPERAND or func in _KEEPS_ITS_MASK:
        return 0
    tensors = [one for one in args if isinstance(one, Tensor)]
    if len({one.dtype for one in tensors}) < 2:
        return 0
    common = torch.result_type(tensors[0], tensors[1])
    copied = [one for one in tensors if one.dtype != common]
    if isinstance(out, Tensor) and out.is_floating_point() and out.dtype != common:
        copied.append(out)
    return sum(one.numel() for one in copied) * common.itemsize


def no_scratch(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """None: CUDA's elementwise kernels convert in registers."""
    return 0
