"""What casts to fp8 and products must give, as cases of `kernel_cases.py`: to the bit, the numbers of a formula.

The formula rounds in fp64, by arithmetic, and knows nothing of torch's fp8 dtypes, nor of bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron3d_kernels import Registry
from megatron3d_kernels.fp8 import E4M3, E5M2, Operand
from megatron3d_kernels.fp8_cast import Orientations
from torch import Tensor

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
MANTISSA = {E4M3: 3, E5M2: 2}
SMALLEST_EXPONENT = {E4M3: -6, E5M2: -14}
BLOCK = 128
PRODUCT_ERROR = 1e-6
"""Relative to the norm: sums of a few hundred terms in fp32."""


def wide_numbers(shape: tuple[int, int], device: torch.device, dtype: torch.dtype, *, seed: int) -> Tensor:
    """Numbers over 14 powers of two, so that some are subnormal in fp8, with a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-10, 4, shape, generator=generator).float())
    x[shape[0] // 2] = 0.0
    return x.to(dtype).to(device)


def scale_formula(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The least power of two by which no number is over the largest of the format; fp64, like its argument."""
    return torch.exp2(torch.ceil(torch.log2(amax / LARGEST[dtype]))).clamp(min=2.0**-100)


def rounding_formula(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of the format, even where two are; fp64."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=1e-300))).clamp(min=SMALLEST_EXPONENT[dtype])
    step = torch.exp2(exponent - MANTISSA[dtype])
    return torch.round(x / step) * step  # to even


def quantized_formula(x_RC: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What a matrix becomes by blocks, and their scales; those at its edges are smaller."""
    rows, columns = x_RC.shape
    edges = (0, -columns % block[1], 0, -rows % block[0])
    blocks = (
        torch.nn.functional.pad(x_RC.double().cpu(), edges).unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    )
    scales = scale_formula(blocks.abs().amax((1, 3), keepdim=True), dtype)
    out = rounding_formula(blocks / scales, dtype) * scales
    return out.flatten(2).flatten(0, 1)[:rows, :columns], scales[:, 0, :, 0]


def assert_equals_formula(operand: Operand | None, x_RC: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> None:
    """A cast of a matrix, whose summed dimension may have zeros added."""
    assert operand is not None, "the cast gave no matrix in this orientation"
    want, scales = quantized_formula(x_RC, dtype, block)
    got = operand.dequantized(torch.float64).cpu()
    assert torch.equal(got[:, : want.shape[1]], want), f"{(got[:, : want.shape[1]] != want).sum()} numbers differ"
    assert not got[:, want.shape[1] :].any(), "what is added to the summed dimension is not zero"
    assert torch.equal(operand.scale.double().cpu().view(scales.shape), scales)


def cast_case(
    shape: tuple[int, int], to: torch.dtype, device: torch.device, dtype: torch.dtype, kernels: Registry
) -> None:
    """All casts of one matrix, in both orientations, alone and together."""
    x_RC = wide_numbers(shape, device, dtype, seed=shape[0])
    amax = kernels.fp8_amax_bits(x_RC)
    assert float(amax.view(torch.float32)) == float(x_RC.abs().max())
    for wanted in (Orientations(), Orientations(rows=False), Orientations(columns=False)):
        for square in (None, True, False):
            if square is None:
                block, pair = shape, kernels.fp8_cast_tensor(x_RC, amax, to, wanted)
            else:
                block = (BLOCK if square else 1, BLOCK)
                pair = kernels.fp8_cast_blocks(x_RC, to, wanted, square=square)
            assert [one is not None for one in pair] == [wanted.rows, wanted.columns]
            if wanted.rows:
                assert_equals_formula(pair[0], x_RC, to, block)
            if wanted.columns:
                assert_equals_formula(pair[1], x_RC.t(), to, block[::-1] if square is None else block)
    rows, _ = kernels.fp8_cast_tensor(x_RC, amax, to, Orientations())
    assert rows is not None
    assert_equals_formula(kernels.fp8_transpose(rows), x_RC.t(), to, shape[::-1])


def product_case(tensorwise: bool, device: torch.device, dtype: torch.dtype, kernels: Registry) -> None:
    """The three products of a linear layer, in fp32, against those of the formula's matrices in fp64."""
    x_TI, w_OI, g_TO = (
        wide_numbers(shape, device, dtype, seed=seed) for seed, shape in enumerate(((72, 128), (256, 128), (72, 256)))
    )

    def cast(x: Tensor, to: torch.dtype, *, square: bool = False) -> tuple[Operand, Operand]:
        both = Orientations()
        if tensorwise:
            rows, columns = kernels.fp8_cast_tensor(x, kernels.fp8_amax_bits(x), to, both)
        else:
            rows, columns = kernels.fp8_cast_blocks(x, to, both, square=square)
        assert rows is not None
        assert columns is not None
        return rows, columns

    def formula(x: Tensor, to: torch.dtype, block: tuple[int, int]) -> Tensor:
        return quantized_formula(x, to, tuple(x.shape) if tensorwise else block)[0]

    (x_rows, x_columns), (w_rows, w_columns) = cast(x_TI, E4M3), cast(w_OI, E4M3, square=True)
    g_rows, g_columns = cast(g_TO, E5M2)
    line, square = (1, BLOCK), (BLOCK, BLOCK)
    w = formula(w_OI, E4M3, square)
    wanted = {
        "output": (x_rows, w_rows, formula(x_TI, E4M3, line) @ w.t()),
        "input gradient": (g_rows, w_columns, formula(g_TO, E5M2, line) @ w),
        "weight gradient": (g_columns, x_columns, formula(g_TO.t(), E5M2, line) @ formula(x_TI.t(), E4M3, line).t()),
    }
    for name, (a, b, want) in wanted.items():
        got = kernels.fp8_product(a, b, torch.float32).double().cpu()
        error = float((got - want).norm() / want.norm())
        assert error < PRODUCT_ERROR, f"{name}: relative error {error}"
        rounded = kernels.fp8_product(a, b, torch.bfloat16).double().cpu()
        assert torch.allclose(rounded, want, rtol=2**-8, atol=float(want.abs().max()) * PRODUCT_ERROR), name


def what_is_not_finite_stays_visible(device: torch.device, dtype: torch.dtype, kernels: Registry) -> None:
    """Infinity, which E4M3 has no number for, and NaN reach every product that the tensor or the block is in."""
    for value in (float("inf"), float("-inf"), float("nan")):
        x_RC = torch.ones(2, 4, device=device, dtype=dtype)
        x_RC[1, 2] = value
        by_tensor, _ = kernels.fp8_cast_tensor(x_RC, kernels.fp8_amax_bits(x_RC), E4M3, Orientations(columns=False))
        by_block, _ = kernels.fp8_cast_blocks(x_RC, E4M3, Orientations(columns=False), square=False)
        assert by_tensor is not None
        assert by_block is not None
        assert bool(by_tensor.dequantized(torch.float32).isnan().all())
        assert by_block.dequantized(torch.float32).isnan().any(1).tolist() == [False, True]


def _cases() -> dict[str, Callable[[torch.device, torch.dtype, Registry], None]]:
    shapes = ((1, 1), (130, 72))
    casts = {
        f"fp8_cast_{rows}x{columns}_{str(to).removeprefix('torch.')}": partial(cast_case, (rows, columns), to)
        for rows, columns in shapes
        for to in (E4M3, E5M2)
    }
    products = {
        f"fp8_product_{'tensorwise' if one else 'blockwise'}": partial(product_case, one) for one in (True, False)
    }
    return {**casts, **products, "fp8_not_finite": what_is_not_finite_stays_visible}


FP8_CASES = _cases()
