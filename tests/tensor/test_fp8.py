"""Linear layers in fp8 against a dense layer whose operands are cast and cast back by a formula in fp64.

The layers compute in fp32 here, so that nothing but the casts rounds. One scale that were another at some layout would
be off by a factor of two, and by far more than the tolerance.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron3d_kernels import Registry
from megatron3d_kernels.fp8 import E4M3, E5M2, Operand
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.params.grads import GradSink
from megatron3d.params.module import declared_parameters
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.fp8_recipe import Fp8Recipe
from megatron3d.tensor.linear import ColumnParallelLinear, RowParallelLinear
from tests.dist.pool import Pool
from tests.kernels.fp8_cases import quantized_formula
from tests.tensor.full import fill, numbered, whole_gradients
from tests.tensor.test_linear import on_ranks, residual_part

S, B, INPUT = 48, 3, 512
PARTS = (512, 256, 256)
OUTPUT = sum(PARTS)
LINE, SQUARE = (1, 128), (128, 128)
NORMAL = Init("normal", 0.02)
ERROR = 1e-6
"""Relative to the norm: fp32 sums of up to 1,024 terms, in another order than those of the reference in fp64."""

RECIPES = {
    "tensorwise": Fp8Recipe("tensorwise"),
    "tensorwise hybrid": Fp8Recipe("tensorwise", E5M2),
    "blockwise": Fp8Recipe("blockwise"),
    "blockwise hybrid": Fp8Recipe("blockwise", E5M2),
    "blockwise, weight gradients apart": Fp8Recipe("blockwise", casts_weight_gradient=False),
}


class ScalesSeen(Registry):
    """Kernels that note the scales of what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[float]] = []

    def fp8_product(
        self, a_MK: Operand, b_NK: Operand, dtype: torch.dtype, *, bias_N: Tensor | None = None, fast: bool = False
    ) -> Tensor:
        """The product."""
        self.seen += [one.scale.flatten().tolist() for one in (a_MK, b_NK) if one.scaling == "tensor"]
        return super().fp8_product(a_MK, b_NK, dtype, bias_N=bias_N, fast=fast)


def context_of(tp: int, sequence_parallel: bool, recipe: Fp8Recipe) -> LayerContext:
    mesh = make_mesh(Layout(tp=tp))
    return LayerContext(mesh.tp, sequence_parallel, GradSink(), ScalesSeen(), fp8=replace(recipe))


def reference(x_TI: Tensor, weight_OI: Tensor, grad_TO: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Output without bias, input gradient and weight gradient of one process, in fp64."""

    def cast(one: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
        return quantized_formula(one, dtype, tuple(one.shape) if recipe.scaling == "tensorwise" else block)[0]

    weight = cast(weight_OI, E4M3, SQUARE)
    output = cast(x_TI, E4M3, LINE) @ weight.t()
    grad_in = cast(grad_TO, recipe.gradient_dtype, LINE) @ weight
    if not recipe.casts_weight_gradient:
        return output, grad_in, grad_TO.double().t() @ x_TI.double()
    grad_OT, x_IT = cast(grad_TO.t(), recipe.gradient_dtype, LINE), cast(x_TI.t(), E4M3, LINE)
    return output, grad_in, grad_OT @ x_IT.t()


def ramp(size: int) -> Tensor:
    """Powers of two from 1 to 8, so that the shards of a tensor have other largest numbers than the whole."""
    return torch.exp2(torch.arange(size) * 4 // size)


def filled(layer: ColumnParallelLinear | RowParallelLinear, context: LayerContext) -> dict[str, Tensor]:
    """Give a layer its shards of parameters that grow along both dimensions; returns the whole ones."""
    wholes = fill(layer, context.tp, dtype=torch.float32, scale=0.02)
    wholes["weight"] *= ramp(OUTPUT // 4).repeat(4)[:, None] * ramp(INPUT)
    spec = declared_parameters(layer)["weight"].spec
    layer.weight = torch.nn.Parameter(spec.take(wholes["weight"], context.tp.size, context.tp.rank).clone())
    return wholes


def assert_near(found: Tensor, wanted: Tensor, what: str) -> None:
    error = float((found.detach().double() - wanted).norm() / wanted.norm())
    assert error < ERROR, f"{what}: relative error {error}"


def part_of(whole: Tensor, parts: tuple[int, ...], context: LayerContext) -> Tensor:
    """This rank's share of each part along the last dimension, by plain slicing."""
    tp, rank = context.tp.size, context.tp.rank
    return torch.cat([one.chunk(tp, -1)[rank] for one in whole.split(parts, -1)], -1)


def check_layers(rank: int, world_size: int, sequence_parallel: bool, name: str) -> list[list[float]]:
    """Both kinds of layer with one input, weight and output gradient at every layout; returns the scales used."""
    recipe = RECIPES[name]
    context = context_of(world_size, sequence_parallel, recipe)
    x, grad = (numbered(S, B, size, seed=seed, dtype=torch.float32) for seed, size in enumerate((INPUT, OUTPUT)))
    x, grad = x * ramp(INPUT) * ramp(S)[:, None, None], grad * ramp(OUTPUT // 4).repeat(4) * 1e-4
    column = ColumnParallelLinear(context, INPUT, OUTPUT, bias=True, init=NORMAL, parts=PARTS)
    row = RowParallelLinear(context, INPUT, OUTPUT, bias=True, init=NORMAL)
    for layer in (column, row):
        wholes = filled(layer, context)
        output, grad_in, grad_weight = reference(x.flatten(0, 1), wholes["weight"], grad.flatten(0, 1), recipe)
        output = (output + wholes["bias"]).view(S, B, OUTPUT)
        grad_in = grad_in.view(S, B, INPUT)
        is_column = layer is column
        cut_x = (
            (lambda one: residual_part(one, context)) if is_column else (lambda one: part_of(one, (INPUT,), context))
        )
        cut_y = (lambda one: part_of(one, PARTS, context)) if is_column else (lambda one: residual_part(one, context))
        own_x = cut_x(x).clone().requires_grad_()
        y = layer(own_x)
        assert_near(y, cut_y(output), f"{name}: output")
        y.backward(cut_y(grad))
        assert_near(own_x.grad, cut_x(grad_in), f"{name}: input gradient")
        found = whole_gradients(layer, context.tp)
        assert_near(found["weight"], grad_weight, f"{name}: weight gradient")
        assert_near(found["bias"], grad.double().sum((0, 1)), f"{name}: bias gradient")
    kernels = context.kernels
    assert isinstance(kernels, ScalesSeen)
    return kernels.seen


@pytest.mark.parametrize("name", RECIPES)
def test_fp8_layers_equal_a_dense_layer_of_cast_operands_at_every_layout(pool: Pool, name: str) -> None:
    scales = [
        seen
        for tp, sequence_parallel in ((1, False), (2, False), (2, True))
        for seen in on_ranks(pool, tp, check_layers, sequence_parallel, name)
    ]
    assert all(seen == scales[0] for seen in scales), f"scales of equal inputs differ between layouts: {scales}"
    assert ("tensorwise" in name) == bool(scales[0])


@pytest.mark.parametrize("scaling", ["tensorwise", "blockwise"])
def test_deferred_weight_gradients_in_fp8_equal_immediate_ones_bitwise(scaling: str) -> None:
    context = context_of(1, False, RECIPES[scaling])
    layer = ColumnParallelLinear(context, INPUT, OUTPUT, bias=True, init=NORMAL)
    fill(layer, context.tp, dtype=torch.bfloat16)
    x, grad = (numbered(S, B, size, seed=seed, dtype=torch.bfloat16) for seed, size in enumerate((INPUT, OUTPUT)))
    parameters = [one.parameter for one in declared_parameters(layer).values()]
    layer(x.requires_grad_()).backward(grad)
    at_once = [one.grad for one in parameters]
    for one in parameters:
        one.grad = None
    with context.sink.defer() as works:
        layer(x).backward(grad)
        assert all(one.grad is None for one in parameters), "work was done instead of deferred"
    for work in works:
        work()
    assert all(torch.equal(one.grad, before) for one, before in zip(parameters, at_once, strict=True))


def test_weights_are_cast_once_while_they_do_not_change() -> None:
    class Counting(Registry):
        casts = 0

        def fp8_cast_tensor(self, x_RC, *arguments):  # type: ignore[no-untyped-def]
            self.casts += x_RC.shape[0] == OUTPUT
            return super().fp8_cast_tensor(x_RC, *arguments)

    kernels = Counting()
    recipe = Fp8Recipe("tensorwise")
    context = replace(context_of(1, False, recipe), kernels=kernels, fp8=recipe)
    layer = ColumnParallelLinear(context, INPUT, OUTPUT, bias=False, init=NORMAL)
    fill(layer, context.tp, dtype=torch.bfloat16)
    x = numbered(S, B, INPUT, seed=0, dtype=torch.bfloat16).requires_grad_()
    with recipe.weights.unchanged():
        for _ in range(3):
            layer(x).sum().backward()
    assert kernels.casts == 1
    before = layer(x).detach()
    with torch.no_grad():
        layer.weight.mul_(2.0)
    assert torch.equal(layer(x), 2.0 * before), "a cast outlived its weights"
