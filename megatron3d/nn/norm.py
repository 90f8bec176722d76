"""LayerNorm and RMSNorm over the last dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron3d_kernels.dropout import RowDropout
from megatron3d_kernels.query_key_norm import HeadNorms
from megatron3d_kernels.residual_norm import RowNorm
from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.params.module import ParallelModule
from megatron3d.params.spec import Init, TpGradient
from megatron3d.tensor.context import LayerContext


class Norm(ParallelModule):
    """The norm that the config names, with a weight and, for LayerNorm, a bias of `size`.

    With `apply_layernorm_1p` the parameter holds the weight less 1, which keeps more of its digits in 16 bits.

    Source: Ba et al. 2016 (LayerNorm); Zhang and Sennrich 2019 (RMSNorm); Megatron-LM `--apply-layernorm-1p`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, config: ModelConfig, context: LayerContext, size: int, *, tp_gradient: TpGradient) -> None:
        super().__init__(tp=context.tp.size)
        self.kernels = context.kernels
        self.epsilon = config.norm_epsilon
        self.is_rms = config.normalization == "RMSNorm"
        self.is_stored_less_one = config.apply_layernorm_1p
        start = Init("zeros" if self.is_stored_less_one else "ones")
        self.declare("weight", (size,), init=start, decays=False, tp_gradient=tp_gradient)
        if self.is_rms:
            self.register_parameter("bias", None)
        else:
            self.declare("bias", (size,), init=Init("zeros"), decays=False, tp_gradient=tp_gradient)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]; statistics in fp32, result in the dtype of `x`."""
        if self.is_rms:
            return self.kernels.rms_norm(x, self._scale(), self.epsilon)
        return self.kernels.layer_norm(x, self._scale(), self.bias, self.epsilon)

    def forked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., size] as it is, for the residual connection, and normalised: where both are used, their gradients are
        added within the norm's backward."""
        return self.kernels.forked_norm(x, self._row_norm())

    def forked_copy(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same with a copy of [..., size], plus a bias without gradient, that a product may be added to in place
        (`RowParallelLinear.onto`)."""
        return self.kernels.forked_norm(x, self._row_norm(), copies=True, bias=bias)

    def of_sum(
        self, residual: Tensor, branch: Tensor, dropping: RowDropout | None, *, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum of [..., size] and a branch with its bias, elements of which may be dropped, and the sum
        normalised."""
        return self.kernels.added_norm(residual, branch, self._row_norm(), bias=bias, dropping=dropping)

    def _row_norm(self) -> RowNorm:
        return RowNorm(self._scale(), self.bias, self.epsilon, self.is_rms)

    def _scale(self) -> Tensor:
        # The sum is made in fp32: 1 + w in 16 bits would round away what storing w keeps.
        return self.weight.float() + 1 if self.is_stored_less_one else self.weight


def head_norms(queries: nn.Module, keys: nn.Module) -> HeadNorms:
    """Two norms of heads, for the kernel that has queries and keys at hand together."""
    assert isinstance(queries, Norm) and isinstance(keys, Norm)
    biases = None if queries.bias is None or keys.bias is None else (queries.bias, keys.bias)
    return HeadNorms((queries._scale(), keys._scale()), biases, queries.epsilon, queries.is_rms)


class ShardedRMSNorm(ParallelModule):
    """RMSNorm of features that are sharded over the tensor axis, of which each rank has its part, and of the weight.

    The mean of squares is that of all ranks' features: `sharded_rms_norms` makes it.
    """

    weight: nn.Parameter

    def __init__(self, config: ModelConfig, context: LayerContext, size: int) -> None:
        super().__init__(tp=context.tp.size)
        self.size, self.epsilon, self.is_stored_less_one = size, config.norm_epsilon, config.apply_layernorm_1p
        start = Init("zeros" if self.is_stored_less_one else "ones")
        self.declare("weight", (size,), init=start, decays=False, tp_dim=0)

    def forward(self, x: Tensor, squares: Tensor) -> Tensor:
        """Normalise this rank's features, [..., size/tp]; `squares`, [...], is the sum of the squares of all ranks'."""
        weight = self.weight.to(squares.dtype) + 1 if self.is_stored_less_one else self.weight
        scale = (squares / self.size + self.epsilon).rsqrt().unsqueeze(-1)
        return (x * scale).to(x.dtype) * weight.to(x.dtype)


def sharded_rms_norms(xs: Sequence[Tensor], norms: Sequence[nn.Module], context: LayerContext) -> tuple[Tensor, ...]:
    """Several tensors [..., features of this rank], each by its `ShardedRMSNorm`, for one sum over the ranks."""
    wide = torch.promote_types(xs[0].dtype, torch.float32)
    squares = context.total(torch.stack([x.to(wide).square().sum(-1) for x in xs]))
    return tuple(norm(x, own) for norm, x, own in zip(norms, xs, squares, strict=True))


def residual_norm(config: ModelConfig, context: LayerContext) -> Norm:
    """A norm of the residual stream [S, B, H]."""
    return Norm(config, context, config.hidden_size, tp_gradient=context.residual_gradient)
