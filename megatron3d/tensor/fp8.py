"""Linear layers whose products are made in fp8: the same layers, communication and gradients as in `linear.py`.

    y = q(x) q(W)^T + b        dx = q(g) q(W)        dW += q(g)^T q(x)

q is the cast to fp8 and back, which is not differentiated. Sums are in fp32; y, dx and the bias are bf16. By one scale
("tensorwise") q(x) is the same in all products. By blocks, dW sums over tokens and so has blocks of 128 tokens.

Scales do not depend on the layout: the largest magnitude of a tensor that is sharded is that over all its shards, one
reduction of 4 bytes; blocks lie within shards, whose sizes are multiples of 128. Positions of one sample that
context-parallel ranks share are one tensor too.

What is kept for the backward is the input in fp8, half of what bf16 takes. Under sequence parallelism it is the shard,
which is gathered in fp8; only blocks of tokens, which a gathered input alone has, need the shard in bf16.

Source: Micikevicius et al. 2022 (arXiv:2209.05433), section 3; DeepSeek-AI 2024 (arXiv:2412.19437), section 3.3.

Shapes: T tokens (sequence x micro-batch), I input and O output features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron3d_kernels.fp8 import E4M3, Operand
from megatron3d_kernels.fp8_cast import Orientations, Pair
from torch import Tensor, nn

from megatron3d.comm.collectives import Pending, all_reduce, start_all_gather, start_all_reduce, start_reduce_scatter
from megatron3d.tensor.context import InputType, LayerContext
from megatron3d.tensor.fp8_recipe import Fp8Recipe


def fp8_linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: Tensor | None,
    *,
    context: LayerContext,
    input_type: InputType,
) -> Tensor:
    """x W^T + b by the fp8 recipe of the context; arguments and result as those of `linear.linear`. The layer is
    row-parallel where the input is "local", else column-parallel."""
    return context.eager(_Fp8Linear.apply, x, weight, bias, context, input_type, torch.is_grad_enabled())


def cast_weight(weight: nn.Parameter, context: LayerContext) -> tuple[Tensor | None, Pair]:
    """The largest magnitude of a weight, if its recipe asks for it, and the weight in fp8 in both orientations, which
    all layers get from here on while weights do not change."""
    largest = _largest_weight(weight, context)
    return largest, _cast_weight(weight, largest, context, Orientations())


class _Fp8Linear(torch.autograd.Function):
    """Keeps the input in fp8, or in bf16 where the backward needs it so."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        context: LayerContext,
        input_type: InputType,
        has_backward: bool,
    ) -> Tensor:
        ctx.weight, ctx.bias, ctx.context, ctx.input_type = weight, bias, context, input_type
        ctx.largest_weight = _largest_weight(weight, context)
        w_OI, _ = _cast_weight(weight, ctx.largest_weight, context, Orientations(columns=has_backward))
        x_TI, kept = _cast_input(x, context, input_type, keeps=has_backward and weight.requires_grad)
        ctx.save_for_backward(*kept)
        assert w_OI is not None, "a cast gives the orientation that is wanted"
        y_TO = context.kernels.fp8_product(x_TI, w_OI, x.dtype, bias_N=bias, fast=True)
        return y_TO.view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        context: LayerContext = ctx.context
        kept = _KeptInput(ctx.saved_tensors, context, ctx.input_type)
        needs_grad_in = ctx.needs_input_grad[0]  # not where everything before is frozen
        wanted = Orientations(rows=needs_grad_in, columns=kept.is_fp8)
        g_TO, g_OT = _cast_gradient(grad_out, context, wanted, is_sharded=ctx.input_type != "local")
        grad_in, reducing = None, None
        if g_TO is not None:
            _, w_IO = _cast_weight(ctx.weight, ctx.largest_weight, context, Orientations(rows=False))
            assert w_IO is not None, "a cast gives the orientation that is wanted"
            grad_TI = context.kernels.fp8_product(g_TO, w_IO, grad_out.dtype)
            grad_in = grad_TI.view(*grad_out.shape[:-1], -1)
            if ctx.input_type == "V":
                reducing = start_reduce_scatter(grad_in, context.tp)
            elif ctx.input_type == "I":
                reducing = start_all_reduce(grad_in, context.tp)
        _add_weight_gradient(ctx.weight, ctx.bias, grad_out, g_OT, kept, context)
        return (reducing.wait() if reducing else grad_in), None, None, None, None, None


class _KeptInput:
    """The input of a layer as its forward kept it; under sequence parallelism the gathering of it starts at once.

    Tensors: none where no weight gradient is wanted; the shard or the input in bf16; or fp8 numbers and their scales.
    """

    def __init__(self, tensors: tuple[Tensor, ...], context: LayerContext, input_type: InputType) -> None:
        self._tensors, self._context = tensors, context
        self._is_shard = input_type == "V"
        self._gathering: Pending | None = None
        if tensors and self._is_shard:
            self._gathering = _start_gather(tensors[0], context)

    @property
    def is_fp8(self) -> bool:
        """Whether the weight gradient is a product in fp8."""
        return bool(self._tensors) and _recipe(self._context).casts_weight_gradient

    def take(self) -> Tensor | None:
        """As it was kept, gathered; None where nothing was."""
        if self._gathering is None:
            return self._tensors[0] if self._tensors else None
        return self._gathering.wait().view(self._tensors[0].dtype)

    def transposed(self) -> Operand:
        """In fp8, [I, T], to be summed over tokens."""
        x, kernels = self.take(), self._context.kernels
        assert x is not None, "nothing was kept of the input"
        if len(self._tensors) == 1:  # blocks of the gathered tokens
            _, x_IT = kernels.fp8_cast_blocks(x.flatten(0, -2), E4M3, Orientations(rows=False), square=False)
            assert x_IT is not None, "a cast gives the orientation that is wanted"
            return x_IT
        scale = self._tensors[1]
        if self._is_shard:
            return kernels.fp8_transpose(Operand(x, scale, "tensor"))
        return Operand(x, scale, "tensor" if _recipe(self._context).scaling == "tensorwise" else "rows")


def _recipe(context: LayerContext) -> Fp8Recipe:
    assert context.fp8 is not None, "a layer that computes in fp8 has a recipe"
    return context.fp8


def _largest(x: Tensor, context: LayerContext, *, over_tp: bool) -> Tensor:
    """The largest magnitude of a tensor, of which other ranks have other parts, as bits."""
    bits = context.kernels.fp8_amax_bits(x)
    for axis in (context.tp, context.cp) if over_tp else (context.cp,):
        bits = all_reduce(bits, axis, reduction="max")
    return bits


def _largest_weight(weight: nn.Parameter, context: LayerContext) -> Tensor | None:
    """That of a weight, all of which are sharded; None where each block has its own. Asked for at every forward, so
    that one that is replayed asks for the same as the one that was recorded."""
    fp8 = _recipe(context)
    if fp8.scaling == "blockwise":
        return None

    def find() -> Tensor:
        return all_reduce(context.kernels.fp8_amax_bits(weight.detach()), context.tp, reduction="max")

    return context.replay.run(partial(fp8.weights.largest, weight, find))


def _cast_weight(weight: nn.Parameter, largest: Tensor | None, context: LayerContext, wanted: Orientations) -> Pair:
    """[O, I] and [I, O]."""

    def make(wanted: Orientations) -> Pair:
        if largest is None:
            return context.kernels.fp8_cast_blocks(weight.detach(), E4M3, wanted, square=True)
        return context.kernels.fp8_cast_tensor(weight.detach(), largest, E4M3, wanted)

    return _recipe(context).weights.cast(weight, make, wanted)


def _cast_input(
    x: Tensor, context: LayerContext, input_type: InputType, *, keeps: bool
) -> tuple[Operand, tuple[Tensor, ...]]:
    """The whole input [T, I] in fp8, and what to keep of it (`_KeptInput`) if anything."""
    fp8, kernels, is_shard = _recipe(context), context.kernels, input_type == "V"
    keeps_fp8 = keeps and fp8.casts_weight_gradient
    wanted = Orientations(columns=keeps_fp8 and not is_shard)
    if fp8.scaling == "tensorwise":
        largest = context.replay.run(lambda: _largest(x, context, over_tp=input_type != "I"))
        rows, columns = kernels.fp8_cast_tensor(x.flatten(0, -2), largest, E4M3, wanted)
        shard = rows
        if is_shard and rows is not None:
            numbers = rows.data_RK
            gathered = context.replay.run(lambda: _start_gather(numbers, context).wait())
            rows = Operand(gathered.view(numbers.dtype), rows.scale, "tensor")
    else:
        gathered = context.replay.run(lambda: _start_gather(x, context).wait()) if is_shard else x
        rows, columns = kernels.fp8_cast_blocks(gathered.flatten(0, -2), E4M3, wanted, square=False)
        shard = None
    assert rows is not None, "a cast gives the orientation that is wanted"
    if not keeps_fp8 or (is_shard and shard is None):
        return rows, (x,) if keeps else ()
    operand = shard if is_shard else columns
    assert operand is not None, "a cast gives the orientation that is wanted"
    return rows, (operand.data_RK, operand.scale)


def _start_gather(x: Tensor, context: LayerContext) -> Pending:
    """Gather the shards of a sequence; fp8 numbers as bytes, the only form in which all backends know them."""
    return start_all_gather(x.view(torch.uint8) if x.element_size() == 1 else x, context.tp)


def _cast_gradient(grad_out: Tensor, context: LayerContext, wanted: Orientations, *, is_sharded: bool) -> Pair:
    """The gradient of the output, [T, O] and [O, T], where they are wanted."""
    fp8, kernels = _recipe(context), context.kernels
    if not (wanted.rows or wanted.columns):
        return None, None
    g_TO = grad_out.flatten(0, -2)
    if fp8.scaling == "blockwise":
        return kernels.fp8_cast_blocks(g_TO, fp8.gradient_dtype, wanted, square=False)
    return kernels.fp8_cast_tensor(g_TO, _largest(g_TO, context, over_tp=is_sharded), fp8.gradient_dtype, wanted)


def _add_weight_gradient(
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    grad_out: Tensor,
    g_OT: Operand | None,
    kept: _KeptInput,
    context: LayerContext,
) -> None:
    """Hand the products to the sink, which may defer them; the bias sums what was not cast."""
    if g_OT is None:
        context.sink.add_linear(weight, bias, grad_out, kept.take(), kernels=context.kernels)
        return
    x_IT, dtype = kept.transposed(), grad_out.dtype

    def make(buffer_OI: Tensor, overwrites: bool) -> None:
        context.kernels.fp8_add_weight_gradient(buffer_OI, g_OT, x_IT, dtype, overwrites=overwrites)

    context.sink.add_made(weight, make)
    context.sink.add_linear(weight, bias, grad_out, None)
