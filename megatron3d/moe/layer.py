"""The feed-forward half of a block as a mixture of experts: each token passes a few of many MLPs.

Four steps: the router chooses (`router.py`), a transport sends tokens to experts (`transport.py`), experts compute
(`experts.py`), and what they give comes back and is added up. What was chosen is counted, for the losses that balance
the load (`balance.py`) and for whoever reports it. No token is dropped unless experts have a capacity (`capacity.py`).

Each rank of the tensor axis routes tokens of its own. Under sequence parallelism it has its own; without, where all
ranks hold all tokens, each takes its part of the sequence and the parts are gathered again behind the experts, so that
nothing is sent or computed twice (Singh et al. 2023, arXiv:2303.06318, section 4.2, drop duplicates in this way).
Context-parallel ranks have tokens of their own too; what is counted by sample is counted over both axes.

With `--mlp-type residual` each token also passes an MLP as wide as an expert, and the layer gives c_0 times what the
experts give plus c_1 times what that gives, c = softmax(C x + b): Rajbhandari et al. 2022 (arXiv:2201.05596), section
4.1, with the weights of DeepSpeed's code.

Shapes: S sequence (local under sequence parallelism), B micro-batch, H hidden, T tokens of this rank (S x B, position
by position), K experts of each, R rows.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron3d_kernels.dropout import child_keys
from torch import Tensor, nn

from megatron3d.comm import typed
from megatron3d.comm.collectives import own_part
from megatron3d.config.sections.model import ModelConfig
from megatron3d.moe.balance import add_balance
from megatron3d.moe.exchange import own_experts
from megatron3d.moe.experts import Experts
from megatron3d.moe.router import Router, TokenPlaces
from megatron3d.moe.transport import transport_of
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.mlp import MLP
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import ReplicatedLinear


class MixtureOfExperts(nn.Module):
    """The experts of one layer with their router, and the expert that all tokens pass, where there is one: a
    `nn.block.FeedForwardBuilder`."""

    def __init__(self, config: ModelConfig, context: LayerContext, *, layer: int) -> None:
        super().__init__()
        self.config, self.context, self.layer = config, context, layer
        self.router = Router(config, context, num_experts=config.experts_of(layer))
        self.transport = transport_of(config, context, self.router.num_experts)
        self.experts = Experts(config, context, numbers=own_experts(context.expert, self.router.num_experts))
        is_residual = config.mlp_type == "residual"
        width = config.expert_ffn_hidden_size if is_residual else config.moe_shared_expert_intermediate_size
        self.shared = MLP(config, context, width=width) if width else None
        self.shared_gate = _shared_gate(config, context) if width and config.moe_shared_expert_gate else None
        self.mixing = _mixing(config, context) if is_residual else None

    def forward(self, x_SBH: Tensor, inputs: LayerInputs) -> Tensor:
        """[S, B, H] on the residual stream to [S, B, H] on the residual stream."""
        return self.context.eager(self._forward, x_SBH, inputs)

    def _forward(self, x_SBH: Tensor, inputs: LayerInputs) -> Tensor:
        own_SBH, places = self._own_tokens(x_SBH, inputs)
        y_TH = self._route(own_SBH.flatten(0, 1), places, inputs)
        y_SBH = self._all_tokens(y_TH.view_as(own_SBH), x_SBH.shape[0])
        return y_SBH if self.shared is None else self._with_shared(y_SBH, x_SBH)

    def _route(self, x_TH: Tensor, places: TokenPlaces, inputs: LayerInputs) -> Tensor:
        routing = self.router(x_TH, places)
        arrived = self.transport.dispatch(x_TH, routing, places)
        y_TH = arrived.combine(self.experts(arrived.rows_RH, arrived.counts))
        if inputs.losses is not None:
            y_TH = add_balance(y_TH, self.router, routing, places, inputs.losses)
        return self.router.count(y_TH, routing, places)

    def _own_tokens(self, x_SBH: Tensor, inputs: LayerInputs) -> tuple[Tensor, TokenPlaces]:
        """This rank's part of the sequence, filled up to the length of the longest part, and where it stands."""
        context = self.context
        length, samples = x_SBH.shape[:2]
        positions_SB = context.positions(x_SBH, inputs.positions_BL)  # [S, 1] where they are those of all samples
        valid_T = None
        if context.sequence_parallel:
            length = length * context.tp.size
        else:
            missing = -length % context.tp.size
            if missing:
                x_SBH, positions_SB = F.pad(x_SBH, (0, 0, 0, 0, 0, missing)), F.pad(positions_SB, (0, 0, 0, missing))
                rows_S = own_part(torch.arange(length + missing, device=x_SBH.device), context.tp)
                valid_T = (rows_S < length).repeat_interleave(samples)
            x_SBH, positions_SB = typed.shard(x_SBH, context.tp), own_part(positions_SB, context.tp)
        is_cut = inputs.shards is not None
        return x_SBH, TokenPlaces(
            torch.arange(samples, device=x_SBH.device).repeat(positions_SB.shape[0]),
            samples,
            length * context.cp.size if is_cut else length,
            None if inputs.dropout is None else partial(self._keys, inputs, positions_SB, samples),
            valid_T,
            has_capacity=inputs.cache is None,
            share=inputs.kept_share,
            position_T=positions_SB.expand(-1, samples).flatten() if is_cut else None,
        )

    def _keys(self, inputs: LayerInputs, positions_SB: Tensor, samples: int) -> Tensor:
        assert inputs.dropout is not None, "keys are of a training step"
        keys_B = inputs.dropout.keys(f"layers.{self.layer}.router", samples, positions_SB.device)
        return child_keys(keys_B, positions_SB).flatten()

    def _all_tokens(self, y_SBH: Tensor, length: int) -> Tensor:
        """Back on the residual stream."""
        if self.context.sequence_parallel or self.context.tp.size == 1:
            return y_SBH
        return typed.all_gather(y_SBH, self.context.tp, dst="I", replay=self.context.replay)[:length]

    def _with_shared(self, y_SBH: Tensor, x_SBH: Tensor) -> Tensor:
        """What the chosen experts give, with what the one gives that all tokens pass: its sum with it, or their mean by
        two learned weights of each token."""
        assert self.shared is not None, "there is a shared expert"
        shared_SBH = self.shared(x_SBH)
        if self.mixing is not None:
            wide = torch.promote_types(y_SBH.dtype, torch.float32)
            weight_SB2 = self.mixing(x_SBH).softmax(-1, dtype=wide).to(y_SBH.dtype)
            return y_SBH * weight_SB2[..., :1] + shared_SBH * weight_SB2[..., 1:]
        return y_SBH + (shared_SBH if self.shared_gate is None else shared_SBH * self.shared_gate(x_SBH).sigmoid())


def _shared_gate(config: ModelConfig, context: LayerContext) -> ReplicatedLinear:
    """A score of each token, from which the gate of the shared expert is made."""
    init = Init("normal", config.init_method_std)
    gradient = context.residual_gradient
    return ReplicatedLinear(context, config.hidden_size, 1, init=init, tp_gradient=gradient, scores=True, bias=False)


def _mixing(config: ModelConfig, context: LayerContext) -> ReplicatedLinear:
    """Two scores of each token, from which the weights of experts and residual MLP are made."""
    init = Init("normal", config.init_method_std)
    return ReplicatedLinear(
        context, config.hidden_size, 2, init=init, tp_gradient=context.residual_gradient, scores=True
    )
