"""Products of fp8 matrices: a b^T for a [M, K] and b [N, K], summed in fp32.

On CUDA they are torch's scaled products (`torch._scaled_mm`, which is cuBLASLt), which need a compute capability of 8.9
or more, or of 9.0 for blocks. Elsewhere both are made bf16 or fp32 again, which is exact (`fp8.py`), and multiplied as
such: the result is that of the fp8 product but for the order of its fp32 sums. torch's own fp8 products on a CPU take
four times as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d_kernels import products
from megatron3d_kernels.fp8 import Operand
from megatron3d_kernels.fp8_cast import FP8_CAST
from megatron3d_kernels.selection import DEFAULT_SELECTION, Selection

_SQUARES_MULTIPLE = 4  # of the blocks along the summed dimension, as the scales of squares are stored


def scaled_product(
    a_MK: Operand,
    b_NK: Operand,
    dtype: torch.dtype,
    *,
    bias_N: Tensor | None = None,
    fast: bool = False,
    selection: Selection = DEFAULT_SELECTION,
) -> Tensor:
    """a b^T + bias, [M, N] in `dtype`, which is bf16 or fp32.

    Args:
        a_MK: the first operand.
        b_NK: the second.
        dtype: of the result.
        bias_N: in bf16.
        fast: may sum in the registers of Hopper's tensor cores, with fewer bits, as is usual for outputs; products by
            blocks never do.
        selection: decides as for the casts.
    """
    is_library = selection.pick(FP8_CAST, a_MK.scale) is FP8_CAST.triton
    if is_library and a_MK.data_RK.device.type != "cpu":
        return _scaled_mm(a_MK, b_NK, dtype, bias_N, fast)
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    product = products.linear(a_MK.dequantized(wide), b_NK.dequantized(wide), bias_N)
    return product.to(dtype)


def add_scaled_weight_gradient(
    buffer_OI: Tensor,
    g_OT: Operand,
    x_IT: Operand,
    layer_dtype: torch.dtype,
    *,
    overwrites: bool = False,
    selection: Selection = DEFAULT_SELECTION,
) -> None:
    """buffer += g^T x, or =, of a layer that computes in some dtype beside its fp8 products.

    On a GPU the product is made in the dtype of the buffer, so that nothing is rounded before the sum. Elsewhere it is
    made in the dtype of the layer, since bf16 products take a fifth of the time of fp32 ones on a CPU, and weight
    gradients of bf16 layers are rounded there too (`products.py`).
    """
    is_library = selection.pick(FP8_CAST, g_OT.scale) is FP8_CAST.triton and buffer_OI.device.type != "cpu"
    product_OI = scaled_product(g_OT, x_IT, buffer_OI.dtype if is_library else layer_dtype, selection=selection)
    if overwrites:
        buffer_OI.copy_(product_OI)
    else:
        buffer_OI.add_(product_OI)


def _scaled_mm(a_MK: Operand, b_NK: Operand, dtype: torch.dtype, bias_N: Tensor | None, fast: bool) -> Tensor:
    a, b = a_MK.data_RK, b_NK.data_RK.t()
    bias = bias_N if dtype != torch.float32 else None  # cuBLASLt adds none to fp32
    if a_MK.scaling == "tensor":
        y = torch._scaled_mm(a, b, a_MK.scale, b_NK.scale, bias=bias, out_dtype=dtype, use_fast_accum=fast)
    else:
        (scale_a, kind_a), (scale_b, kind_b) = (_block_scale(one) for one in (a_MK, b_NK))
        y = F.scaled_mm(a, b, scale_a, kind_a, scale_b, kind_b, bias=bias, output_dtype=dtype)
    return y if bias_N is None or bias is not None else y + bias_N


def _block_scale(operand: Operand) -> tuple[Tensor, F.ScalingType]:
    """Scales in torch's shapes and strides: of rows [R, K / 128], of squares [K / 128, R / 128], with neighbours along
    the first dimension."""
    if operand.scaling == "rows":
        return operand.scale, F.ScalingType.BlockWise1x128
    scale_rk = F.pad(operand.scale, (0, -operand.scale.shape[1] % _SQUARES_MULTIPLE)).contiguous()
    return scale_rk.t(), F.ScalingType.BlockWise128x128
