"""LayerNorm and RMSNorm over the last dimension."""

from __future__ import annotations

from torch import Tensor

from megatron3d.config.model import ModelConfig
from megatron3d.params.module import ParallelModule
from megatron3d.params.spec import Init, TpGradient
from megatron3d.tensor.context import LayerContext


class Norm(ParallelModule):
    """The norm that the config names, with a weight and, for LayerNorm, a bias of `size`.

    Source: Ba et al. 2016 (LayerNorm); Zhang and Sennrich 2019 (RMSNorm).
    """

    def __init__(self, config: ModelConfig, context: LayerContext, size: int, *, tp_gradient: TpGradient) -> None:
        super().__init__(tp=context.tp.size)
        self.kernels = context.kernels
        self.epsilon = config.norm_epsilon
        self.is_rms = config.normalization == "RMSNorm"
        self.declare("weight", (size,), init=Init("ones"), decays=False, tp_gradient=tp_gradient)
        if self.is_rms:
            self.register_parameter("bias", None)
        else:
            self.declare("bias", (size,), init=Init("zeros"), decays=False, tp_gradient=tp_gradient)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]; statistics in fp32, result in the dtype of `x`."""
        if self.is_rms:
            return self.kernels.rms_norm(x, self.weight, self.epsilon)
        return self.kernels.layer_norm(x, self.weight, self.bias, self.epsilon)


def residual_norm(config: ModelConfig, context: LayerContext) -> Norm:
    """A norm of the residual stream [S, B, H]."""
    return Norm(config, context, config.hidden_size, tp_gradient=context.residual_gradient)
