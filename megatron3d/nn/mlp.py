"""The feed-forward half of a block, cut over the tensor axis along its inner width F.

Source: Vaswani et al. 2017, section 3.3; Shazeer 2020 for the gated kinds, whose gate and up projections are fused.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.nn.attention import output_init
from megatron3d.nn.inputs import LayerInputs
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where the activation is gated."""

    def __init__(self, config: ModelConfig, context: LayerContext, *, width: int | None = None) -> None:
        """`width` is F, by default that of the model."""
        super().__init__()
        self.config, self.kernels = config, context.kernels
        inner, bias = width or config.ffn_hidden_size, config.add_bias_linear
        parts = (inner, inner) if config.is_gated else ()
        normal = Init("normal", config.init_method_std)
        self.up = ColumnParallelLinear(
            context, config.hidden_size, inner * max(1, len(parts)), bias=bias, init=normal, parts=parts
        )
        self.down = RowParallelLinear(context, inner, config.hidden_size, bias=bias, init=output_init(config))

    def forward(self, x_SBH: Tensor, inputs: LayerInputs | None = None) -> Tensor:
        """[S, B, H] on the residual stream to [S, B, H] on the residual stream; `inputs`, which every feed-forward half
        is given, are not needed."""
        return self.down(self._activate(self.up(x_SBH)))

    def _activate(self, x_SBF: Tensor) -> Tensor:
        kind = self.config.activation
        if self.config.is_gated:
            return self.kernels.fused_gated_activation(x_SBF, kind)  # [S, B, 2F]: the gate, then the up projection
        return self.kernels.activation(x_SBF, kind)
