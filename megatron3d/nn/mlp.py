"""The feed-forward half of a block, cut over the tensor axis along its inner width F.

Source: Vaswani et al. 2017, section 3.3; Shazeer 2020 for the gated kinds, whose gate and up projections are fused.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.nn.attention import output_init
from megatron3d.nn.chunks import PositionwiseLayer, in_chunks
from megatron3d.nn.inputs import LayerInputs
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where the activation is gated."""

    def __init__(
        self, config: ModelConfig, context: LayerContext, *, width: int | None = None, num_chunks: int = 1
    ) -> None:
        """`width` is F, by default that of the model. In more than one chunk of the sequence no tensor [S, B, F] is
        made, and the backward computes the layer again."""
        super().__init__()
        self.config, self.context, self.kernels = config, context, context.kernels
        self.num_chunks = num_chunks
        inner, bias = width or config.ffn_hidden_size, config.add_bias_linear
        parts = (inner, inner) if config.is_gated else ()
        normal = Init("normal", config.init_method_std)
        self.up = ColumnParallelLinear(
            context, config.hidden_size, inner * max(1, len(parts)), bias=bias, init=normal, parts=parts
        )
        self.down = RowParallelLinear(context, inner, config.hidden_size, bias=bias, init=output_init(config))

    @property
    def can_add_onto(self) -> bool:
        """Whether the output can be added to another tensor in the last product."""
        return self.num_chunks == 1 and self.down.can_add_onto

    def forward(self, x_SBH: Tensor, inputs: LayerInputs | None = None, *, onto_SBH: Tensor | None = None) -> Tensor:
        """[S, B, H] on the residual stream to [S, B, H] on the residual stream; `inputs`, which every feed-forward half
        is given, are not needed.

        With `onto_SBH` the result is that tensor with the output added to it in place (`RowParallelLinear.onto`).
        """
        if onto_SBH is not None:
            assert self.can_add_onto, f"{self.num_chunks} chunks, {self.down.context.tp.size} tensor-parallel ranks"
            return self.down.onto(self._inner(x_SBH), onto_SBH)
        if self.num_chunks == 1:
            return self._at_once(x_SBH)
        layer = PositionwiseLayer(self._at_once, self.context.sink)
        return self.context.eager(in_chunks, layer, x_SBH, self.num_chunks, tuple(self.parameters()))

    def _at_once(self, x_SBH: Tensor) -> Tensor:
        return self.down(self._inner(x_SBH))

    def _inner(self, x_SBH: Tensor) -> Tensor:
        return self._activate(self.up(x_SBH, own_bias_gradient=False))

    def _activate(self, x_SBF: Tensor) -> Tensor:
        kind, bias = self.config.activation, self.up.bias
        if self.config.is_gated:  # [S, B, 2F]: the gate, then the up projection
            return self.kernels.fused_gated_activation(x_SBF, kind, bias=bias)
        return self.kernels.activation(x_SBF, kind, bias=bias)
