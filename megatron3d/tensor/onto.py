"""A row-parallel layer's product that is added to the residual stream in place, where nothing comes between the two.

    base += x W^T

The product reads what it adds to where a sum after it would read both and write a third. It rounds once instead of
twice. `base` must be a tensor that nobody else reads (`Norm.forked`), and holds the bias already.

Shapes: S sequence, B micro-batch, I input and O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.tensor.context import LayerContext


class _LinearOnto(torch.autograd.Function):
    """See `linear_onto`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        context: LayerContext,
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.weight, ctx.bias, ctx.context = weight, bias, context
        context.kernels.add_linear(base, x, weight)
        ctx.mark_dirty(base)
        return base

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        context: LayerContext = ctx.context
        grad_in = context.kernels.input_gradient(grad_out, ctx.weight) if ctx.needs_input_grad[0] else None
        context.sink.add_linear(ctx.weight, ctx.bias, grad_out, x, kernels=context.kernels)
        return grad_in, grad_out if ctx.needs_input_grad[1] else None, None, None, None


def linear_onto(
    x_SBI: Tensor, base_SBO: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, *, context: LayerContext
) -> Tensor:
    """`base_SBO` with x W^T added to it in place; weight gradients go to the sink of the context.

    Args:
        x_SBI: this rank's input features, all of them.
        base_SBO: without gaps; the bias has been added to it, whose gradient is made here.
        weight: [O, I].
        bias: [O] or None.
        context: the sink and the kernels.
    """
    return context.eager(_LinearOnto.apply, x_SBI, base_SBO, weight, bias, context)
