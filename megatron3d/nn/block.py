"""One transformer block: attention and MLP, each added to the residual stream, with a norm before or after.

Source: Vaswani et al. 2017, section 3.1, for the norm after each sum; Radford et al. 2019 (GPT-2), section 2.3, for
the norm before each half.
"""

from __future__ import annotations

from typing import Protocol

from megatron3d_kernels.dropout import RowDropout
from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.errors import ConfigError
from megatron3d.nn.attention import SelfAttention
from megatron3d.nn.dropout import hidden_dropout
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.mlp import MLP
from megatron3d.nn.norm import Norm, residual_norm
from megatron3d.tensor.context import LayerContext


class FeedForwardBuilder(Protocol):
    """Makes the feed-forward half of a layer: a module from ([S, B, H] of the residual stream, `LayerInputs`) to
    [S, B, H]."""

    def __call__(self, config: ModelConfig, context: LayerContext, *, layer: int) -> nn.Module:
        """That of one layer."""
        ...


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or, with norms after, norm(x + attention(x)), norm(x + mlp(x)).

    With norms before, the residual may be taken from after the norm (`apply_residual_connection_post_layernorm`).
    A `first_only` block gives the first position alone, for a head that reads no other: keys and values of all
    positions, everything else of one. It needs attention in both directions, since under a causal mask the first
    position would see itself alone, and a residual stream that is not sharded along the sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        *,
        layer: int,
        recompute_core: bool = False,
        first_only: bool = False,
        mlp_chunks: int = 1,
        feed_forward: FeedForwardBuilder | None = None,
    ) -> None:
        """`feed_forward` makes the second half; by default an MLP in `mlp_chunks` chunks of the sequence.

        Raises: ConfigError if the layer has experts and nothing is given that makes them.
        """
        super().__init__()
        if feed_forward is None and config.experts_of(layer):
            raise ConfigError(
                f"--num-experts {config.num_experts} asks for experts in layer {layer}, whose block is made without; "
                "leave it out, or give the block megatron3d.moe.layer.MixtureOfExperts"
            )
        assert not (first_only and context.sequence_parallel), "one rank of several holds the first position"
        assert not (first_only and config.is_causal), "the first position of a causal model attends to itself alone"
        self.config, self.context, self.layer, self.first_only = config, context, layer, first_only
        self.attention_norm = residual_norm(config, context)
        self.attention = SelfAttention(
            config, context, layer=layer, recompute_core=recompute_core, first_only=first_only
        )
        self.mlp_norm = residual_norm(config, context)
        if feed_forward is None:
            self.mlp = MLP(config, context, num_chunks=mlp_chunks)
        else:
            self.mlp = feed_forward(config, context, layer=layer)

    def forward(self, x_SBH: Tensor, inputs: LayerInputs) -> Tensor:
        """[S, B, H] to [S, B, H] (S local under sequence parallelism), or to [1, B, H] of the first position."""
        if self.config.norm_position == "post":
            residual_SBH = self._kept(x_SBH)
            x_SBH = self._after_attention(self.attention_norm, residual_SBH, x_SBH, inputs)[1]
            return self.mlp_norm.of_sum(x_SBH, self.mlp(x_SBH, inputs), self._dropping(x_SBH, inputs, "mlp"))[1]
        if self._adds_in_products(x_SBH, inputs):
            return self._added_in_products(x_SBH, inputs)
        x_SBH, normed_SBH = self.attention_norm.forked(x_SBH)
        residual_SBH = self._kept(self._residual(x_SBH, normed_SBH))
        x_SBH, normed_SBH = self._after_attention(self.mlp_norm, residual_SBH, normed_SBH, inputs)
        residual_SBH = self._residual(x_SBH, normed_SBH)
        return self._added(residual_SBH, self.mlp(normed_SBH, inputs), self._dropping(x_SBH, inputs, "mlp"))

    def _after_attention(
        self, norm: Norm, residual_SBH: Tensor, x_SBH: Tensor, inputs: LayerInputs
    ) -> tuple[Tensor, Tensor]:
        """The residual plus attention of `x_SBH`, and its norm; a bias that follows a reduction is added there."""
        dropping = self._dropping(residual_SBH, inputs, "attention")
        branch_SBH = self.attention(x_SBH, inputs, with_late_bias=False)
        return norm.of_sum(residual_SBH, branch_SBH, dropping, bias=self.attention.projection.late_bias)

    def _added(self, residual_SBH: Tensor, branch_SBH: Tensor, dropping: RowDropout | None) -> Tensor:
        if dropping is None:
            return residual_SBH + branch_SBH
        return self.context.kernels.dropout(branch_SBH, dropping.keys, dropping.probability, residual=residual_SBH)

    def _adds_in_products(self, x_SBH: Tensor, inputs: LayerInputs) -> bool:
        """Whether nothing comes between the products that end a half and the residual stream, and the norm's kernel
        makes the copy of the stream that they are added to."""
        drops = inputs.dropout is not None and self.config.hidden_dropout > 0
        if drops or self.first_only or self.config.apply_residual_connection_post_layernorm:
            return False
        return self.attention.projection.can_add_onto and self.context.kernels.writes_copies(x_SBH)

    def _added_in_products(self, x_SBH: Tensor, inputs: LayerInputs) -> Tensor:
        """A block with norms before its halves, each of which is added to the stream by its last product."""
        copy_SBH, normed_SBH = self.attention_norm.forked_copy(x_SBH, self.attention.projection.bias)
        x_SBH = self.attention(normed_SBH, inputs, onto_SBH=copy_SBH)
        if not (isinstance(self.mlp, MLP) and self.mlp.can_add_onto):
            x_SBH, normed_SBH = self.mlp_norm.forked(x_SBH)
            return x_SBH + self.mlp(normed_SBH, inputs)
        copy_SBH, normed_SBH = self.mlp_norm.forked_copy(x_SBH, self.mlp.down.bias)
        return self.mlp(normed_SBH, inputs, onto_SBH=copy_SBH)

    def _kept(self, x_SBH: Tensor) -> Tensor:
        return x_SBH[:1] if self.first_only else x_SBH

    def _residual(self, x_SBH: Tensor, normed_SBH: Tensor) -> Tensor:
        return normed_SBH if self.config.apply_residual_connection_post_layernorm else x_SBH

    def _dropping(self, x_SBH: Tensor, inputs: LayerInputs, half: str) -> RowDropout | None:
        """What is dropped of a half's output, which has the shape of `x_SBH`."""
        if inputs.dropout is None or self.config.hidden_dropout == 0.0:
            return None
        return self.context.eager(self._row_dropout, x_SBH, inputs, half)

    def _row_dropout(self, x_SBH: Tensor, inputs: LayerInputs, half: str) -> RowDropout | None:
        return hidden_dropout(
            x_SBH,
            self.config.hidden_dropout,
            inputs.dropout,
            site=f"layers.{self.layer}.{half}",
            positions_SB=self.context.positions(x_SBH, inputs.positions_BL),
            kernels=self.context.kernels,
        )
