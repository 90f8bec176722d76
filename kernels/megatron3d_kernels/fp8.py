"""Matrices in 8-bit floating point: formats, scales, and what a matrix times its scales is.

A matrix is stored as fp8 numbers q and scales s, and stands for q * s. Scales are powers of two, so that multiplying by
them is exact: q * s is a number of bf16, a tensor that comes again gets the scale that it had, and a scale moves only
where a largest value crosses a power of two. That costs up to one bit of range and no precision.

    s = 2^ceil(log2(amax / MAX)),  q = round_to_nearest_even(x / s)

- "tensor": one scale for all elements ("tensorwise", or current scaling, where amax is that of this very tensor).
- "rows": one for each 1 x 128 elements along the dimension that a product sums over.
- "squares": one for each 128 x 128 elements.

Source: Micikevicius et al. 2022 (arXiv:2209.05433) for the formats, E4M3 with 448 as its largest value and E5M2 with
57,344; DeepSeek-AI 2024 (arXiv:2412.19437), section 3.3, for the blocks. `fp8_cast.py` makes such matrices,
`fp8_products.py` multiplies them.

Shapes: R rows, K the dimension that a product sums over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scaling = Literal["tensor", "rows", "squares"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EXPONENT_OF_MAX = {E4M3: 8, E5M2: 15}
"""Largest values are 1.75 * 2^8 = 448 and 1.75 * 2^15 = 57,344."""
BLOCK = 128

# Bits of fp32 numbers as integers, whose order is that of the magnitudes, infinity and NaN above all others.
MANTISSA_BITS = 23
EXPONENT_MASK = 0x7F800000
UP_TO_MAX = 0x1FFFFF  # carries into the exponent where the mantissa is over 1.75, that of the largest values
SMALLEST_SCALE_BITS = (127 - 100) << MANTISSA_BITS  # 2^-100, whose inverse and square are numbers of fp32 too
INVERSE_BITS = 254 << MANTISSA_BITS  # the bits of 1/s are this less those of s, where s is a power of two
NAN_BITS = 0x7FC00000


@dataclass(frozen=True)
class Operand:
    """One operand of a product: fp8 numbers [R, K] and their fp32 scales, by `scaling`: [1], [R, ceil(K / 128)], or
    [ceil(R / 128), ceil(K / 128)]. Products sum over K."""

    data_RK: Tensor
    scale: Tensor
    scaling: Scaling

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[R, K] in a wider dtype; exact in bf16, fp32 and fp64."""
        rows, columns = self.data_RK.shape
        scale = self.scale.to(dtype)
        if self.scaling == "tensor":
            return self.data_RK.to(dtype).mul_(scale)
        if self.scaling == "squares":
            scale = scale.repeat_interleave(BLOCK, 0, output_size=BLOCK * scale.shape[0])[:rows]
        scale = scale.repeat_interleave(BLOCK, 1, output_size=BLOCK * scale.shape[1])
        return self.data_RK.to(dtype).mul_(scale[:, :columns])

    def transposed(self) -> Operand:
        """The same numbers summed over the other dimension, as a view; of one scale or square blocks."""
        assert self.scaling != "rows", "blocks along one dimension are no blocks along the other"
        return Operand(self.data_RK.t(), self.scale.t() if self.scaling == "squares" else self.scale, self.scaling)


def scale_of(amax_bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale, fp32, for a largest magnitude, given as the bits of an fp32 number (int32). One of infinity or NaN
    gives NaN, so that what is not finite stays visible in every product."""
    bits = ((amax_bits + UP_TO_MAX) & EXPONENT_MASK) - (EXPONENT_OF_MAX[dtype] << MANTISSA_BITS)
    bits = bits.clamp(min=SMALLEST_SCALE_BITS)
    return torch.where(amax_bits < EXPONENT_MASK, bits, NAN_BITS).view(torch.float32)


def inverse_of(scale: Tensor) -> Tensor:
    """1 / scale, exactly; NaN of NaN."""
    return torch.where(scale.isnan(), NAN_BITS, INVERSE_BITS - scale.view(torch.int32)).view(torch.float32)


def bits_of(magnitudes: Tensor) -> Tensor:
    """The bits of magnitudes as fp32 numbers, int32, without a sign, which NaN may have."""
    return magnitudes.float().view(torch.int32) & 0x7FFFFFFF


def padded(x_RC: Tensor, multiple_R: int, multiple_C: int) -> Tensor:
    """The matrix with zeros after its rows and columns, up to multiples of these; itself where there are none."""
    below, right = -x_RC.shape[0] % multiple_R, -x_RC.shape[1] % multiple_C
    return F.pad(x_RC, (0, right, 0, below)) if below or right else x_RC
