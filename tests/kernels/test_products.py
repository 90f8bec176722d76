"""The three products of a linear layer through either library, against float64, and what they allocate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron3d_kernels import KernelError, Registry, products
from torch import Tensor

from tests.planner.measured import allocations_of

SIZES = st.integers(0, 70)
STRIDES = ("dense", "transposed", "every other column", "every other row")
NOISE = 3e-6  # share of the largest possible sum that fp32 rounding of up to 70 terms may be off by


def laid_out(rows: int, columns: int, how: str, seed: int) -> Tensor:
    """A random fp32 matrix [rows, columns] with these strides."""
    draw = torch.Generator().manual_seed(seed)
    if how == "transposed":
        return torch.randn(columns, rows, generator=draw).t()
    if how == "every other column":
        return torch.randn(rows, 2 * columns, generator=draw)[:, ::2]
    if how == "every other row":
        return torch.randn(2 * rows, columns, generator=draw)[::2]
    return torch.randn(rows, columns, generator=draw)


def assert_near(found: Tensor, wanted: Tensor, largest: Tensor) -> None:
    """Equal but for the rounding of sums whose terms add up to `largest` at most."""
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert bool(((found.double() - wanted).abs() <= NOISE * (1 + largest)).all())


@pytest.mark.parametrize("library", products.LIBRARIES)
@settings(max_examples=60, deadline=None)
@given(
    tokens=SIZES, inputs=SIZES, outputs=SIZES, how=st.tuples(*[st.sampled_from(STRIDES)] * 3), has_bias=st.booleans()
)
def test_products_equal_float64_at_every_shape_and_stride(
    library: str, tokens: int, inputs: int, outputs: int, how: tuple[str, str, str], has_bias: bool
) -> None:
    kernels = Registry(library=library)
    x, grad = laid_out(tokens, inputs, how[0], 1), laid_out(tokens, outputs, how[1], 2)
    weight, buffer = laid_out(outputs, inputs, how[2], 3), laid_out(outputs, inputs, "dense", 4)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(5)) if has_bias else None
    wide_x, wide_grad, wide_weight = x.double(), grad.double(), weight.double()
    shift = torch.zeros(outputs).double() if bias is None else bias.double()
    largest = wide_x.abs() @ wide_weight.t().abs() + shift.abs()
    assert_near(kernels.linear(x, weight, bias), wide_x @ wide_weight.t() + shift, largest)
    largest = wide_grad.abs() @ wide_weight.abs()
    assert_near(kernels.input_gradient(grad, weight), wide_grad @ wide_weight, largest)
    wanted, largest = wide_grad.t() @ wide_x, wide_grad.t().abs() @ wide_x.abs()
    assert_near(kernels.weight_gradient(grad, x), wanted, largest)
    before = buffer.double()
    kernels.add_weight_gradient(buffer, grad, x)
    assert_near(buffer, before + wanted, before.abs() + largest)

    buffer.fill_(torch.nan)
    kernels.add_weight_gradient(buffer, grad, x, overwrites=True)
    assert_near(buffer, wanted, largest)


@pytest.mark.parametrize(("inputs", "outputs"), [(130, 9000), (9000, 130), (2048, 2048)])
def test_a_weight_gradient_of_many_blocks_is_the_whole_product(inputs: int, outputs: int) -> None:
    """Wide enough that both orientations take more than one block."""
    x, grad = laid_out(40, inputs, "dense", 1), laid_out(40, outputs, "dense", 2)
    buffer, wanted, largest = torch.ones(outputs, inputs), grad.t().double() @ x.double(), grad.t().abs() @ x.abs()
    for first in (1.0, 0.0):
        Registry(library="onednn").add_weight_gradient(buffer, grad, x, overwrites=first == 0)
        assert_near(buffer, first + wanted, first + largest.double())


@settings(max_examples=40, deadline=None)
@given(tokens=SIZES, inputs=SIZES, outputs=SIZES, how=st.tuples(*[st.sampled_from(STRIDES)] * 3))
def test_bf16_products_are_rounded_once_at_every_shape_and_stride(
    tokens: int, inputs: int, outputs: int, how: tuple[str, str, str]
) -> None:
    """With the bias inside and either operand transposed, which torch's own calls round no better."""
    draw = torch.Generator().manual_seed(5)
    x, grad, weight = (
        laid_out(*shape, one, seed).bfloat16()
        for seed, (shape, one) in enumerate(zip(((tokens, inputs), (tokens, outputs), (outputs, inputs)), how))
    )
    bias = torch.randn(outputs, generator=draw).bfloat16()
    wanted = {
        "linear": x.double() @ weight.double().t() + bias.double(),
        "weight gradient": grad.double().t() @ x.double(),
    }
    found = {"linear": Registry().linear(x, weight, bias), "weight gradient": Registry().weight_gradient(grad, x)}
    for name, exact in wanted.items():
        assert found[name].dtype == torch.bfloat16 and found[name].shape == exact.shape
        # Half a unit in the last of bf16's 8 bits, and the rounding of an fp32 sum.
        assert bool(((found[name].double() - exact).abs() <= exact.abs() * 2**-8 + 2e-5).all()), name


def in_fp32(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.mm or torch.addmm with `out_dtype`, which a CPU lacks: operands widened without loss, the sum in fp32."""

    def multiply(*operands: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert out_dtype == out.dtype == torch.float32 and operands[-1].dtype != torch.float32
        return product(*(one.float() for one in operands), out=out)

    return multiply


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_inside", [True, False])
def test_weight_gradients_of_narrow_operands_reach_an_fp32_buffer(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_inside: bool
) -> None:
    """Inside of the product without a rounding to `dtype`; else rounded once, and no more."""
    monkeypatch.setattr(products, "adds_in_fp32", lambda device: is_inside)
    monkeypatch.setattr(torch, "mm", in_fp32(torch.mm) if is_inside else torch.mm)
    monkeypatch.setattr(torch, "addmm", in_fp32(torch.addmm) if is_inside else torch.addmm)
    x, grad = laid_out(70, 33, "dense", 1).to(dtype), laid_out(70, 21, "every other column", 2).to(dtype)
    wanted, largest = grad.double().t() @ x.double(), grad.double().t().abs() @ x.double().abs()
    rounding = 0.0 if is_inside else torch.finfo(dtype).eps / 2
    for first in (1.0, 0.0):
        buffer = torch.full((21, 33), first or torch.nan)
        Registry().add_weight_gradient(buffer, grad, x, overwrites=first == 0)
        error = (buffer.double() - first - wanted).abs()
        assert bool((error <= rounding * wanted.abs() + NOISE * (1 + largest)).all())
        assert is_inside or bool((error > NOISE * (1 + largest)).any())  # the bound can be missed


def test_a_cpu_adds_no_products_in_fp32() -> None:
    """As said by the registry; when torch learns it, the way through a temporary should go."""
    assert not products.adds_in_fp32(torch.device("cpu"))
    with pytest.raises((RuntimeError, TypeError)):
        products.add_in_fp32(torch.zeros(8, 8), *[torch.ones(8, 8).bfloat16()] * 2)


def test_onednn_makes_no_copy_of_weights_and_no_temporary_of_their_size() -> None:
    kernels, tokens, inputs, outputs = Registry(library="onednn"), 64, 1024, 4096
    x, grad, weight = torch.ones(tokens, inputs), torch.ones(tokens, outputs), torch.ones(outputs, inputs)
    buffer = torch.zeros_like(weight)
    spare = 1 << 16  # of small scratch inside oneDNN
    scratch = tokens * (inputs + outputs) * 4 + spare
    assert allocations_of(lambda: kernels.linear(x, weight, None)).peak <= grad.nbytes + scratch
    assert allocations_of(lambda: kernels.input_gradient(grad, weight)).peak <= x.nbytes + scratch
    # A copy of the narrower operand and one block of the product.
    seen = allocations_of(lambda: kernels.add_weight_gradient(buffer, grad, x))
    assert seen.peak <= x.nbytes + 4 * (1 << 20) + scratch < weight.nbytes


def test_what_onednn_gives_may_be_written_to_in_an_autograd_function() -> None:
    """As the loss does with the logits: autograd forbids it of a view that a function returns."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return Registry(library="onednn").linear(x, 2 * torch.eye(3), None)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    x = torch.ones(2, 2, 3, requires_grad=True)
    Doubled.apply(x).mul_(3).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 2, 3), 6.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs_whatever_is_asked_for(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 7, dtype=dtype), torch.randn(3, 7, dtype=dtype)
    found = [Registry(library=library).linear(x, weight, None) for library in products.LIBRARIES]
    assert torch.equal(*found) and found[0].dtype == dtype


def test_a_library_that_is_unknown_or_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="no library 'blas' for products; use one of torch, onednn"):
        Registry(library="blas")
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    with pytest.raises(KernelError, match="need a torch that is built with oneDNN"):
        Registry(library="onednn")


@pytest.mark.parametrize("library", products.LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_written_into_rows_that_lie_apart(library: str, dtype: torch.dtype, has_bias: bool) -> None:
    """Three blocks of two rows, each between rows that stay as they are."""
    kernels, draw = Registry(library=library), torch.Generator().manual_seed(1)
    x, weight = (torch.randn(shape, generator=draw).to(dtype) for shape in ((3, 7, 33), (21, 33)))
    bias = torch.randn(21, generator=draw).to(dtype) if has_bias else None
    y, back, rows = torch.full((3, 7, 21), 9.0, dtype=dtype), torch.full_like(x, 9.0), slice(2, 4)
    kernels.linear_into(y[:, rows], x[:, rows], weight, bias)
    kernels.input_gradient_into(back[:, rows], y[:, rows], weight)
    at_once = torch.full_like(y, 9.0)
    products.multiply_blocks(at_once[:, rows], x[:, rows], weight.t(), bias)

    tolerance = {"rtol": 2**-8, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    wanted, wanted_back = torch.full((3, 7, 21), 9.0).double(), torch.full((3, 7, 33), 9.0).double()
    wanted[:, rows] = x[:, rows].double() @ weight.t().double() + (0 if bias is None else bias.double())
    wanted_back[:, rows] = y[:, rows].double() @ weight.double()
    for found, expected in ((y, wanted), (at_once, wanted), (back, wanted_back)):
        torch.testing.assert_close(found.double(), expected, **tolerance)
