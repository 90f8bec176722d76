"""Column- and row-parallel linear layers with their own backward.

A column-parallel layer cuts its output features over the tensor axis, a row-parallel layer its input features; in
pairs (QKV and projection, up and down) they need one collective on the way in and one on the way out.
With sequence parallelism those become an all-gather and a reduce-scatter along the sequence.

The backward is written out so that it can (a) overlap the collective of the input gradient with the product for the
weight gradient, (b) keep only the sequence shard of the input and gather it again, and (c) defer the weight gradient
for schedules that split the backward. With `--tp-comm-overlap` collectives that no product hides otherwise, as those of
the forward, run beside the products of chunks (`overlap.py`).

Source: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2.

Shapes: S sequence (local under sequence parallelism where type is V), B micro-batch, I input and O output features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.comm import typed
from megatron3d.comm.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from megatron3d.params.module import ParallelModule
from megatron3d.params.spec import ZEROS, Init, ParamKind, TpGradient
from megatron3d.tensor.context import InputType, LayerContext
from megatron3d.tensor.fp8 import fp8_linear
from megatron3d.tensor.onto import linear_onto
from megatron3d.tensor.overlap import gather_and_multiply, multiply_and_reduce, row_linear


class _Linear(torch.autograd.Function):
    """y = x W^T + b, with the collective that the type of x asks for. See `linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        context: LayerContext,
        input_type: InputType,
    ) -> Tensor:
        # Under sequence parallelism only the shard is kept, and nothing where no gradient of the weight is made of it.
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.weight, ctx.bias, ctx.context, ctx.input_type = weight, bias, context, input_type
        gathered = x
        if input_type == "V" and context.overlap_chunks > 1:
            multiply = partial(context.kernels.linear_into, weight=weight, bias=bias)
            return gather_and_multiply(x, len(weight), multiply, context)
        if input_type == "V":
            gathered = context.replay.run(lambda: start_all_gather(x, context.tp).wait())
        return context.kernels.linear(gathered, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        context: LayerContext = ctx.context
        gathering = start_all_gather(x, context.tp) if ctx.input_type == "V" and x is not None else None
        grad_in, reducing = None, None
        # Where no product for the weight gradient follows, the sum runs beside the chunks of this one.
        in_chunks = context.overlap_chunks > 1 and ctx.input_type != "local" and (x is None or context.sink.defers)
        if ctx.needs_input_grad[0] and in_chunks:
            multiply = partial(context.kernels.input_gradient_into, weight=ctx.weight)
            scatters = ctx.input_type == "V"
            grad_in = multiply_and_reduce(grad_out, ctx.weight.shape[1], multiply, context, scatters=scatters)
        elif ctx.needs_input_grad[0]:  # not where everything before is frozen
            grad_in = context.kernels.input_gradient(grad_out, ctx.weight)
            if ctx.input_type == "V":
                reducing = start_reduce_scatter(grad_in, context.tp)
            elif ctx.input_type == "I":
                reducing = start_all_reduce(grad_in, context.tp)
        gathered = gathering.wait() if gathering else x
        context.sink.add_linear(ctx.weight, ctx.bias, grad_out, gathered, kernels=context.kernels)
        return (reducing.wait() if reducing else grad_in), None, None, None, None


def linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: Tensor | None,
    *,
    context: LayerContext,
    input_type: InputType,
) -> Tensor:
    """x W^T + b, whose weight gradients go to the sink of the context.

    Args:
        x: [S, B, I]; its type on the tensor axis is `input_type`: "I" (alike on all ranks; the input gradient is
            summed), "V" (sharded along S; gathered here, the input gradient is reduce-scattered) or "local" (this
            rank's own input features; no communication).
        weight: [O, I], this rank's shard.
        bias: [O] or None.
        context: the axis, the sink and the kernels.

    Returns:
        [S, B, O] with the whole S.
    """
    return context.eager(_Linear.apply, x, weight, bias, context, input_type)


def declare_linear(
    module: ParallelModule,
    shape: tuple[int, int],
    *,
    bias: bool,
    init: Init,
    tp_dim: int | None = None,
    parts: tuple[int, ...] = (),
    tp_gradient: TpGradient = "equal",
    is_table: bool = False,
    kind: ParamKind = "dense",
) -> None:
    """Declare the weight [O, I] of a linear layer and, if it has one, its bias [O], which is sharded where the outputs
    are. `tp_gradient` is about what is not sharded; `ParamSpec` has the meaning of each value."""
    module.declare(
        "weight",
        shape,
        init=init,
        decays=True,
        tp_dim=tp_dim,
        parts=parts,
        tp_gradient=tp_gradient,
        is_table=is_table,
        kind=kind,
    )
    if not bias:
        module.register_parameter("bias", None)
        return
    cut = 0 if tp_dim == 0 else None
    module.declare(
        "bias", shape[:1], init=ZEROS, decays=False, tp_dim=cut, parts=parts, tp_gradient=tp_gradient, kind=kind
    )


class ColumnParallelLinear(ParallelModule):
    """Output features cut over the tensor axis: I or V in, V along the last dimension out.

    Fused outputs (query, key, value; gate, up) are named by `parts`, each of which is cut by itself, so a rank's
    output is its part of the first, then of the second, and so on.

    With `own_bias_gradient` False what reads the output makes the gradient of the bias, in a pass that it makes anyway.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        context: LayerContext,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        init: Init,
        parts: tuple[int, ...] = (),
    ) -> None:
        super().__init__(tp=context.tp.size)
        self.context = context
        declare_linear(self, (out_features, in_features), bias=bias, init=init, tp_dim=0, parts=parts)

    def forward(self, x_SBI: Tensor, *, own_bias_gradient: bool = True) -> Tensor:
        """[S, B, I] (S local under sequence parallelism) to [S, B, O/tp]."""
        input_type: InputType = "V" if self.context.sequence_parallel else "I"
        bias = self.bias if own_bias_gradient or self.bias is None else self.bias.detach()
        apply = linear if self.context.fp8 is None else fp8_linear
        return apply(x_SBI, self.weight, bias, context=self.context, input_type=input_type)


class RowParallelLinear(ParallelModule):
    """Input features cut over the tensor axis: V along the last dimension in, I or V along the sequence out.

    The bias is added once, after the reduction; in the product where there is none.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, context: LayerContext, in_features: int, out_features: int, *, bias: bool, init: Init) -> None:
        super().__init__(tp=context.tp.size)
        self.context = context
        gradient = context.residual_gradient
        declare_linear(self, (out_features, in_features), bias=bias, init=init, tp_dim=1, tp_gradient=gradient)

    def forward(self, x_SBI: Tensor, *, with_late_bias: bool = True) -> Tensor:
        """[S, B, I/tp] to [S, B, O] (S local under sequence parallelism), without `late_bias` if the caller adds it."""
        apply = linear if self.context.fp8 is None else fp8_linear
        if self.context.tp.size == 1:
            return apply(x_SBI, self.weight, self.bias, context=self.context, input_type="local")
        if self.context.overlap_chunks > 1:
            y_SBO = self.context.eager(row_linear, x_SBI, self.weight, self.context)
        else:
            partial_SBO = apply(x_SBI, self.weight, None, context=self.context, input_type="local")
            y_SBO = to_residual(partial_SBO, self.context)
        return y_SBO if self.bias is None or not with_late_bias else y_SBO + self.bias

    @property
    def late_bias(self) -> Tensor | None:
        """The bias where it is added after the reduction, and not in the product."""
        return self.bias if self.context.tp.size > 1 else None

    @property
    def can_add_onto(self) -> bool:
        """Whether `onto` can be used: the product of this rank is the whole output, and no product in fp8."""
        return self.context.tp.size == 1 and self.context.fp8 is None

    def onto(self, x_SBI: Tensor, base_SBO: Tensor) -> Tensor:
        """`base_SBO`, which has the bias, with the product of [S, B, I] added in place."""
        return linear_onto(x_SBI, base_SBO, self.weight, self.bias, context=self.context)


class ReplicatedLinear(ParallelModule):
    """A small linear layer that every rank of the tensor axis holds whole and applies to what it has.

    `tp_gradient` says what its gradients are then: "equal" where all ranks have the same input and output gradient,
    "partial" where they have different rows, or partial sums of the output gradient. `scores` says that its outputs
    are scores of classes rather than a hidden vector (`ParamSpec.is_table`).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        context: LayerContext,
        in_features: int,
        out_features: int,
        *,
        init: Init,
        tp_gradient: TpGradient,
        scores: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(tp=context.tp.size)
        self.context = context
        shape = (out_features, in_features)
        declare_linear(self, shape, bias=bias, init=init, tp_gradient=tp_gradient, is_table=scores)

    def forward(self, x_SBI: Tensor) -> Tensor:
        """[..., I] to [..., O]; gradients of the input have the type that those of the output have."""
        return linear(x_SBI, self.weight, self.bias, context=self.context, input_type="local")


def to_residual(partial_SBH: Tensor, context: LayerContext) -> Tensor:
    """P to the type of the residual stream: V along the sequence under sequence parallelism, else I."""
    if context.sequence_parallel:
        return context.eager(typed.reduce_scatter, partial_SBH, context.tp, dim=0, replay=context.replay)
    return context.eager(typed.all_reduce, partial_SBH, context.tp, dst="I", replay=context.replay)
