"""Products of fp8 matrices: torch's own on a CPU agree, and what CUDA is handed has the shapes that torch asks for."""

from __future__ import annotations

import pytest
import torch
from megatron3d_kernels import Registry, TritonSupport, fp8_cast
from megatron3d_kernels.fp8 import E4M3, E5M2, Operand
from megatron3d_kernels.fp8_cast import Orientations
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

BOTH = Orientations()


def both(kernels: Registry, x: Tensor, to: torch.dtype, recipe: str, *, square: bool = False) -> list[Operand]:
    if recipe == "tensorwise":
        pair = kernels.fp8_cast_tensor(x, kernels.fp8_amax_bits(x), to, BOTH)
    else:
        pair = kernels.fp8_cast_blocks(x, to, BOTH, square=square)
    return [one for one in pair if one is not None]


@pytest.mark.parametrize("to", [E4M3, E5M2])
def test_products_by_one_scale_are_those_of_torch(to: torch.dtype) -> None:
    """Source: `torch._scaled_mm`, which multiplies fp8 numbers as they are and scales the sum."""
    x, w = (torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    a, b = (both(Registry(), one, dtype, "tensorwise")[0] for one, dtype in ((x * 1e-3, to), (w, E4M3)))
    theirs = torch._scaled_mm(a.data_RK, b.data_RK.t(), a.scale, b.scale, out_dtype=torch.float32)
    ours = Registry().fp8_product(a, b, torch.float32)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("tokens", [300, 256])  # the former are padded with zeros where they are summed over
def test_operands_have_the_shapes_and_strides_that_cuda_multiplies(
    recipe: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source: torch's own checks of fp8 operands and scales on CUDA, which fake tensors of `cuda` pass too."""
    monkeypatch.setattr(fp8_cast, "launch", lambda *arguments, **constants: None)
    gpu = Registry("triton", support=TritonSupport(installed=True, interpreted=False, detail="fake"))
    with FakeTensorMode():
        x, g, w, bias = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            for shape in ((tokens, 256), (tokens, 768), (768, 256), (768,))
        )
        (x_TI, x_IT), (g_TO, g_OT) = both(gpu, x, E4M3, recipe), both(gpu, g, E5M2, recipe)
        w_OI, w_IO = both(gpu, w, E4M3, recipe, square=True)
        assert gpu.fp8_product(x_TI, w_OI, torch.bfloat16, bias_N=bias, fast=True).shape == (tokens, 768)
        assert gpu.fp8_product(g_TO, w_IO, torch.bfloat16).shape == (tokens, 256)
        assert gpu.fp8_product(g_OT, x_IT, torch.float32).dtype == torch.float32


def test_weight_gradients_reach_buffers_as_sums_or_in_their_place() -> None:
    kernels = Registry()
    x, g = (torch.randn(40, size, generator=torch.Generator().manual_seed(size)) for size in (16, 24))
    (_, x_IT), (_, g_OT) = (both(kernels, one, E4M3, "tensorwise") for one in (x, g))
    product = kernels.fp8_product(g_OT, x_IT, torch.float32)
    buffer = torch.full((24, 16), float("nan"))
    kernels.fp8_add_weight_gradient(buffer, g_OT, x_IT, torch.float32, overwrites=True)
    assert torch.equal(buffer, product)
    kernels.fp8_add_weight_gradient(buffer, g_OT, x_IT, torch.float32)
    assert torch.equal(buffer, product + product)
