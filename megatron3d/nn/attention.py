"""Self-attention with its heads cut over the tensor axis: multi-head, grouped-query and multi-query.

Query, key and value are one column-parallel projection of three fused parts, so that each rank holds whole heads;
the projection back is row-parallel. The core between them is `attention_core.py`.

With more tensor-parallel ranks than key and value heads, each of these is sharded over the ranks of the `kv` axis, and
gathered there before use: every rank then has a copy of the head that its queries read, and the gradients of the copies
are summed by the backward of the gather. Weights, gradients and checkpoints are cut as ever.

Source: Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries); Shoeybi et al. 2019, section 3 (the cut).

Shapes: S sequence (whole inside attention), T keys, B micro-batch, H hidden, N query heads, G key and value heads,
D head size, d the part of a head that a rank projects (D / ranks of `kv`). N and G are this rank's: divided by tp,
and G at least 1.
"""

from __future__ import annotations

from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.nn.attention_core import Masking, ProbabilityDropout, attend
from megatron3d.nn.context.gathered import gathered_keys
from megatron3d.nn.context.kinds import context_attention
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.norm import Norm, ShardedRMSNorm, head_norms, sharded_rms_norms
from megatron3d.nn.recompute import recomputed
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import ColumnParallelLinear, RowParallelLinear


class SelfAttention(nn.Module):
    """Attention of one block. `recompute_core` recomputes the attention probabilities in the backward, unless a GPU's
    kernel keeps none; `first_only` lets the first position alone attend (to all)."""

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        *,
        layer: int,
        recompute_core: bool = False,
        first_only: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.context, self.layer, self.recompute_core = config, context, layer, recompute_core
        self.first_only = first_only
        self.over_context = context_attention(context, layer=layer)
        head = config.kv_channels
        query, key = config.num_attention_heads * head, config.num_query_groups * head
        self.local_parts = tuple(size // context.tp.size for size in (query, key, key))
        normal, scaled = Init("normal", config.init_method_std), output_init(config)
        bias = config.add_bias_linear
        self.qkv = ColumnParallelLinear(
            context,
            config.hidden_size,
            query + 2 * key,
            bias=bias or config.add_qkv_bias,
            init=normal,
            parts=(query, key, key),
        )
        self.projection = RowParallelLinear(context, query, config.hidden_size, bias=bias, init=scaled)
        if config.qk_layernorm_across_heads:
            self.query_norm = ShardedRMSNorm(config, context, query)
            self.key_norm = ShardedRMSNorm(config, context, key)
        elif config.qk_layernorm:
            # Every rank uses these weights on its own heads, so their gradient is a partial sum at any layout.
            self.query_norm = Norm(config, context, head, tp_gradient="partial")
            self.key_norm = Norm(config, context, head, tp_gradient="partial")

    def forward(
        self, x_SBH: Tensor, inputs: LayerInputs, *, onto_SBH: Tensor | None = None, with_late_bias: bool = True
    ) -> Tensor:
        """[S, B, H] on the residual stream to [S, B, H] on the residual stream ([1, B, H] where one attends), without
        the projection's late bias if the caller adds it.

        With `onto_SBH` the result is that tensor with the output added to it in place (`RowParallelLinear.onto`).
        """
        q_BNSD, k_BGSD, v_BGSD = self._heads(x_SBH, inputs)
        if self.first_only:
            q_BNSD = q_BNSD[:, :, :1]
        if inputs.cache is not None:
            if inputs.shards is not None:
                k_BGSD, v_BGSD = gathered_keys(k_BGSD, v_BGSD, self.context, inputs.shards)
            k_BGSD, v_BGSD = inputs.cache.extend(self.layer, k_BGSD, v_BGSD)
        y_BNSD = self.context.eager(self._attended, q_BNSD, k_BGSD, v_BGSD, inputs)
        y_SBO = y_BNSD.permute(2, 0, 1, 3).flatten(2)
        if y_SBO.is_cuda:  # FlashAttention's is [B, S, O] in memory: one copy now, instead of one in each product
            y_SBO = y_SBO.contiguous()
        if onto_SBH is not None:
            return self.projection.onto(y_SBO, onto_SBH)
        return self.projection(y_SBO, with_late_bias=with_late_bias)

    def _heads(self, x_SBH: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N, S, D], keys and values [B, G, S, D], normalised and turned as the model says."""
        config, kernels = self.config, self.context.kernels
        if not config.qk_layernorm_across_heads and self.context.kv is None:
            return self._fused_heads(self.qkv(x_SBH, own_bias_gradient=False), inputs)
        q_SBO, k_SBO, v_SBO = self._parts(x_SBH)
        q, k, v = (part_SBO.unflatten(-1, (-1, config.kv_channels)) for part_SBO in (q_SBO, k_SBO, v_SBO))
        q, k, v = (x_SBND.permute(1, 2, 0, 3) for x_SBND in (q, k, v))
        if config.qk_layernorm and not config.qk_layernorm_across_heads:
            q, k = self.query_norm(q), self.key_norm(k)
        if inputs.rotary is not None:
            cos, sin = inputs.rotary
            q, k = (kernels.apply_rotary(x, cos, sin, config.rotary_interleaved) for x in (q, k))
        return q, k, v

    def _fused_heads(self, qkv_SBO: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the projection's output, whose bias gets its gradient here."""
        config, kernels, rotary, bias = self.config, self.context.kernels, inputs.rotary, self.qkv.bias
        interleaved = config.rotary_interleaved
        heads = (self.local_parts[0] // config.kv_channels, self.local_parts[1] // config.kv_channels)
        if not config.qk_layernorm:
            return kernels.query_key_value(qkv_SBO, heads, rotary, interleaved=interleaved, bias=bias)
        norms = head_norms(self.query_norm, self.key_norm)
        return kernels.normalised_query_key_value(qkv_SBO, heads, norms, rotary, interleaved=interleaved, bias=bias)

    def _parts(self, x_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three outputs of the projection, [S, B, O] each, normalised across heads and gathered over `kv`."""
        q_SBO, k_SBO, v_SBO = self.qkv(x_SBH).split(self.local_parts, dim=-1)
        if self.config.qk_layernorm_across_heads:
            norms = (self.query_norm, self.key_norm)
            q_SBO, k_SBO = sharded_rms_norms((q_SBO, k_SBO), norms, self.context)
        if self.context.kv is not None:
            k_SBO, v_SBO = self.context.whole_heads(torch.stack((k_SBO, v_SBO))).unbind()
        return q_SBO, k_SBO, v_SBO

    def _attended(self, q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, inputs: LayerInputs) -> Tensor:
        recomputes = self.recompute_core and not self.context.kernels.keeps_no_scores(q_BNSD)
        if recomputes and torch.is_grad_enabled():
            return recomputed(partial(self._core, inputs=inputs), q_BNSD, k_BGTD, v_BGTD, inputs=inputs)
        return self._core(q_BNSD, k_BGTD, v_BGTD, inputs)

    def _core(self, q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, inputs: LayerInputs) -> Tensor:
        """softmax(q k^T / sqrt(D)) v; where no mask is given, causal if the model is."""
        if self.over_context is not None and inputs.shards is not None and inputs.cache is None:
            return self.over_context(q_BNSD, k_BGTD, v_BGTD, inputs)
        mask_BST = inputs.attention_mask_BST
        if mask_BST is not None and self.first_only:
            mask_BST = mask_BST[:, :1]
        queries, keys = q_BNSD.shape[2], k_BGTD.shape[2]
        is_known = mask_BST is not None or inputs.rectangles is not None
        assert is_known or queries in (1, keys), f"{queries} queries of {keys} keys need a mask"
        masking = Masking(mask_BST, self.config.is_causal and queries > 1, inputs.rectangles)
        dropout = self._dropout(inputs, heads=q_BNSD.shape[1])
        return attend(q_BNSD, k_BGTD, v_BGTD, masking, dropout, kernels=self.context.kernels)

    def _dropout(self, inputs: LayerInputs, *, heads: int) -> ProbabilityDropout | None:
        rate, stream, shard = self.config.attention_dropout, inputs.dropout, self.context.tp.rank
        if stream is None or rate == 0.0:
            return None
        return ProbabilityDropout(
            rate, stream, f"layers.{self.layer}.attention.core", first_head=shard * heads, shard=shard
        )


def output_init(config: ModelConfig) -> Init:
    """Initial values of the two projections that write to the residual stream: std / sqrt(2 x layers), or std alone
    where norms follow each sum and the stream does not grow with depth.

    Source: Radford et al. 2019 (GPT-2), section 2.3; Devlin et al. 2018 (BERT), whose released code has one std.
    """
    if config.norm_position == "post":
        return Init("normal", config.init_method_std)
    return Init("normal", config.init_method_std / sqrt(2.0 * config.num_layers))
