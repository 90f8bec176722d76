"""Moments kept in fp32 or bf16, and worked on in fp32; `megatron3d_kernels.rounding` has how bf16 ones are rounded."""

from __future__ import annotations

import torch
from megatron3d_kernels.rounding import store_bf16
from torch import Tensor

MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_moment(moment: Tensor) -> Tensor:
    """The values in fp32: the tensor itself, or a copy of a bf16 one."""
    return moment if moment.dtype == torch.float32 else moment.float()


def write_moment(moment: Tensor, values: Tensor, *, count: int) -> None:
    """Store fp32 values at step `count`; `values` is what `read_moment` gave, changed in place, and is used up."""
    store_bf16(moment, values, count=count)
