"""The experts of one layer that this rank holds: MLPs of one shape, each of which computes rows of its own.

An expert is declared like any layer, under a name that is the same at every layout (`experts.7.up.weight`); a rank
declares only its own. So initial values, checkpoints, resharding and conversions see linear layers and nothing else.
Each may be cut over the `expert_tp` axis along its inner width F, as an MLP is over `tp`.

The rows of all experts of the rank lie in one tensor, sorted by expert. An expert without rows has gradients of zero,
which it contributes all the same: whoever counts contributions need not know how tokens were routed.

Source: Shazeer et al. 2017 (arXiv:1701.06538), section 2.

Shapes: R rows of this rank's experts, I input and O output features, H hidden, F inner width (local: F / expert_tp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.nn.attention import output_init
from megatron3d.params.module import ParallelModule
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import declare_linear


class _GroupedLinear(torch.autograd.Function):
    """The linear layers of several experts, each of its own rows. See `grouped_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RI: Tensor,
        layers: Sequence[ExpertLinear],
        counts: Sequence[int],
        context: LayerContext,
        *weights: nn.Parameter,
    ) -> Tensor:
        ctx.save_for_backward(x_RI if any(weight.requires_grad for weight in weights) else None)
        ctx.layers, ctx.counts, ctx.context, ctx.weights = layers, counts, context, weights
        return context.kernels.grouped_linear(x_RI, weights, [layer.added_bias for layer in layers], counts)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        (x_RI,) = ctx.saved_tensors
        context: LayerContext = ctx.context
        grad_RI = None
        if ctx.needs_input_grad[0]:
            grad_RI = context.kernels.grouped_input_gradient(grad_RO, ctx.weights, ctx.counts)
        biases = [layer.bias for layer in ctx.layers]
        context.sink.add_grouped_linear(ctx.weights, biases, grad_RO, x_RI, ctx.counts, kernels=context.kernels)
        return grad_RI, None, None, None, *(None for _ in ctx.weights)


def grouped_linear(
    x_RI: Tensor, layers: Sequence[ExpertLinear], counts: Sequence[int], context: LayerContext
) -> Tensor:
    """x W_e^T + b_e for the rows of each expert, whose weight gradients go to the sink of the context.

    Args:
        x_RI: rows sorted by expert; their type on the `expert_tp` axis is R.
        layers: that of each expert.
        counts: rows of each expert; they add up to R.
        context: the sink and the kernels.

    Returns:
        [R, O]; of a layer that is cut along I a partial sum.
    """
    return _GroupedLinear.apply(x_RI, tuple(layers), tuple(counts), context, *(layer.weight for layer in layers))


class ExpertLinear(ParallelModule):
    """The weight and bias of one linear layer of one expert, cut over `expert_tp` along dimension `tp_dim`."""

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
        tp_dim: int,
        parts: tuple[int, ...] = (),
    ) -> None:
        super().__init__(tp=context.expert_tp.size)
        # Where the outputs are partial sums, one rank adds the bias. The gradients of all sums are the same, so each
        # rank has the bias's whole gradient.
        self._adds_bias = tp_dim == 0 or context.expert_tp.rank == 0
        shape = (out_features, in_features)
        declare_linear(self, shape, bias=bias, init=init, tp_dim=tp_dim, parts=parts, kind="expert")

    @property
    def added_bias(self) -> nn.Parameter | None:
        """The bias where this rank adds it."""
        return self.bias if self._adds_bias else None


class Expert(nn.Module):
    """The parameters of one expert."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        inner, bias = config.expert_ffn_hidden_size, config.add_bias_linear
        parts = (inner, inner) if config.is_gated else ()
        normal = Init("normal", config.init_method_std)
        self.up = ExpertLinear(
            context,
            config.hidden_size,
            inner * max(1, len(parts)),
            bias=bias,
            init=normal,
            tp_dim=0,
            parts=parts,
        )
        self.down = ExpertLinear(context, inner, config.hidden_size, bias=bias, init=output_init(config), tp_dim=1)


class Experts(nn.ModuleDict):
    """This rank's experts by their numbers in the layer."""

    def __init__(self, config: ModelConfig, context: LayerContext, *, numbers: range) -> None:
        super().__init__({str(number): Expert(config, context) for number in numbers})
        self.config, self.context = config, context

    def forward(self, x_RH: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows sorted by expert, of which each has `counts`, [R, H], to what the experts give, a partial sum over
        `expert_tp`, [R, H]."""
        experts = [expert for expert in self.values() if isinstance(expert, Expert)]
        inner_RF = grouped_linear(x_RH, [expert.up for expert in experts], counts, self.context)
        return grouped_linear(self._activate(inner_RF), [expert.down for expert in experts], counts, self.context)

    def _activate(self, x_RF: Tensor) -> Tensor:
        kind, kernels = self.config.activation, self.context.kernels
        if not x_RF.shape[0]:  # kernels on a GPU cannot be started for no rows
            return x_RF[:, : x_RF.shape[1] // 2] if self.config.is_gated else x_RF.clone()
        return kernels.fused_gated_activation(x_RF, kind) if self.config.is_gated else kernels.activation(x_RF, kind)
