"""The router: a score of every expert for each token, the K experts that a token passes, and how much each weighs.

    logits  l = W x                                                    in fp32 or fp64, whatever the model computes in
    scores  s = softmax(l), or sigmoid(l)                              over all experts
    choice  the K largest of l, or of s + b with a bias b              of all, or of the best groups of experts
    weights softmax of the chosen l; or the chosen s as they are (--moe-router-pre-softmax); or, of a sigmoid, the
            chosen s divided by their sum                              times a factor

The choice has no gradient; the weights do. Experts of a token are in ascending order of their numbers. The bias follows
the load: after each step b_e rises by the rate where expert e had fewer tokens of the global batch than the mean, falls
where it had more, and its mean is taken out. Counts are whole numbers, so its path is the same at every layout.

Every rank of the tensor axis routes tokens of its own, so gradients here are partial sums over that axis.

Source: Shazeer et al. 2017 (arXiv:1701.06538); Fedus et al. 2021 (arXiv:2101.03961), section 2.4, for fp32; DeepSeek-AI
2024 (arXiv:2412.19437), section 2.1.2, for sigmoid, groups and bias. The order of softmax and choice is Megatron-LM's.

Shapes: T tokens, K experts of each, E experts, G groups, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron3d_kernels.dropout import child_keys
from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.moe.capacity import capacity_of, kept_choices
from megatron3d.params.module import ParallelModule
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
LOAD, ENTROPY, DROPPED = "tokens_per_expert", "entropy", "dropped"  # names of totals of a step
_OF_SELECTION = 1 << 32  # number of the key of random selection among those of a token; noise has the first


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of a rank stand.

    Attributes:
        sample_T: sample of the micro-batch, int64.
        num_samples: of the micro-batch, B.
        length: of a sample, S, with the tokens of other ranks.
        keys: makes a random key of each token, int64 [T], a function of run, step, layer, sample and position alone;
            None where nothing random is drawn, as in evaluation.
        has_capacity: whether these are whole sequences, of which an expert may drop tokens.
        valid_T: which are tokens; others fill up a shard and pass no expert. None where all are.
        share: of the positions of the sequence those that stand here, above 0 to 1; the others pass the layer by.
        position_T: where each stands in its sample, int64, where context-parallel ranks have other tokens of the same
            samples; None where tensor-parallel ranks have all of them, one rank's before the next one's.
    """

    sample_T: Tensor
    num_samples: int
    length: int
    keys: Callable[[], Tensor] | None
    valid_T: Tensor | None
    has_capacity: bool = True
    share: float = 1.0
    position_T: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """Where tokens go.

    Attributes:
        expert_TK: the experts of each token, int64, ascending.
        weight_TK: how much each weighs, in the dtype of the router, with a gradient.
        logits_TE: of all experts, with a gradient.
        counts_E: tokens of each expert, int64, those included that its capacity drops.
        kept_TK: which choices are kept; None where all are.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    logits_TE: Tensor
    counts_E: Tensor
    kept_TK: Tensor | None


class Router(ParallelModule):
    """The router of one layer, the same on all ranks.

    Its state: `bias` [E], and `previous` [E], the counts of the step before, for the loss that is about the global
    batch.
    """

    weight: nn.Parameter
    bias: Tensor
    previous: Tensor
    tokens_per_expert: Tensor

    def __init__(self, config: ModelConfig, context: LayerContext, *, num_experts: int) -> None:
        super().__init__(tp=context.tp.size)
        self.config, self.context, self.num_experts = config, context, num_experts
        shape, init = (self.num_experts, config.hidden_size), Init("normal", config.init_method_std)
        self.declare("weight", shape, init=init, decays=True, tp_gradient="partial", is_table=True)
        self.declare_total(LOAD, (self.num_experts,), is_partial=True)
        self.declare_total(ENTROPY, (1,), is_partial=True)
        self.declare_total(DROPPED, (1,), is_partial=True)
        if config.moe_router_enable_expert_bias:
            self.declare_state("bias", (self.num_experts,), torch.float32)
        # Counted in every run, so that one may add the loss of the global batch to those of the run before.
        self.declare_state("previous", (self.num_experts,), torch.int64, may_be_missing=True)

    def forward(self, x_TH: Tensor, places: TokenPlaces) -> Routing:
        """Route the tokens of this rank, [T, H]."""
        dtype = _DTYPES[self.config.moe_router_dtype]
        logits_TE = _Logits.apply(self._jittered(x_TH, places), self.weight, self.context, dtype)
        expert_TK = self.choose(self._selection(logits_TE.detach()), places)
        weight_TK = self._weights(logits_TE, expert_TK)
        kept_TK = self.keep(expert_TK, weight_TK, places)
        return Routing(expert_TK, weight_TK, logits_TE, self._count(expert_TK, places), kept_TK)

    def choose(self, selection_TE: Tensor, places: TokenPlaces) -> Tensor:
        """The K experts of largest value of each token, ascending, int64 [T, K]."""
        config = self.config
        if config.moe_router_force_load_balancing:
            return self._balanced(selection_TE.shape[0], selection_TE.device)
        if config.moe_router_num_groups is not None and config.moe_router_group_topk is not None:
            selection_TE = in_best_groups(
                selection_TE,
                num_groups=config.moe_router_num_groups,
                best=config.moe_router_group_topk,
                num_chosen=config.moe_router_topk,
            )
        return selection_TE.topk(config.moe_router_topk, dim=-1).indices.sort(dim=-1).values

    def keep(self, expert_TK: Tensor, weight_TK: Tensor, places: TokenPlaces) -> Tensor | None:
        """Which choices their experts have room for, bool [T, K]; None where all are kept."""
        valid_TK = None if places.valid_T is None else places.valid_T.unsqueeze(1).expand_as(expert_TK)
        capacity = capacity_of(self.config, self.num_experts, places.length) if places.has_capacity else None
        if capacity is None:
            return valid_TK
        choose = partial(
            kept_choices,
            expert_TK if valid_TK is None else expert_TK.masked_fill(~valid_TK, -1),
            self._priority(expert_TK, weight_TK, places),
            places.sample_T,
            capacity=capacity,
            num_experts=self.num_experts,
            tp=self.context.tp,
            cp=self.context.cp,
            position_T=places.position_T,
        )
        return self.context.replay.run(choose)

    def count(self, x: Tensor, routing: Routing, places: TokenPlaces) -> Tensor:
        """`x`, which flows on to the output; when its gradient comes, the tokens of each expert, the entropies of
        their scores and the choices that are dropped have been counted."""
        if not torch.is_grad_enabled():
            return x
        with torch.no_grad():
            scores_TE = self.scores(routing.logits_TE)
            entropy_T = torch.special.entr(scores_TE).sum(-1)
            if places.valid_T is not None:
                entropy_T = entropy_T * places.valid_T
            kept = routing.counts_E.sum() if routing.kept_TK is None else routing.kept_TK.sum()
        x = self.contribute(x, ENTROPY, entropy_T.sum().view(1))
        x = self.contribute(x, DROPPED, (routing.counts_E.sum() - kept).view(1))
        return self.contribute(x, LOAD, routing.counts_E)

    def scores(self, logits_TE: Tensor) -> Tensor:
        """The scores of all experts, which add up to 1 for each token, [T, E]: what the losses of balance are about."""
        if self.config.moe_router_score_function == "softmax":
            return logits_TE.softmax(-1)
        scores_TE = logits_TE.sigmoid()
        return scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)

    @torch.no_grad()
    def update_state(self) -> None:
        """Move the bias by the load of the step, and keep the load."""
        load = self.tokens_per_expert
        if "bias" in self.state_specs:
            above = load * self.num_experts - load.sum()  # whole numbers
            self.bias.sub_(self.config.moe_router_bias_update_rate * above.sign().float())
            self.bias.sub_(self.bias.mean())
        self.previous.copy_(load)

    def _selection(self, logits_TE: Tensor) -> Tensor:
        """What the largest are chosen of."""
        if self.config.moe_router_score_function == "softmax":
            # Softmax does not change the order, but sums over groups of experts depend on it.
            return logits_TE.softmax(-1) if self.config.moe_router_pre_softmax else logits_TE
        scores_TE = logits_TE.sigmoid()
        return scores_TE + self.bias if "bias" in self.state_specs else scores_TE

    def _priority(self, expert_TK: Tensor, weight_TK: Tensor, places: TokenPlaces) -> Tensor | None:
        """Which choices go first where an expert has not room for all, the largest; None where the earlier do."""
        policy = self.config.moe_token_drop_policy
        if policy == "position":
            return None
        if policy == "random" and places.keys is not None:
            own_T = child_keys(places.keys(), torch.full_like(places.sample_T, _OF_SELECTION))
            return child_keys(own_T.unsqueeze(1), expert_TK)
        return weight_TK.detach()

    def _weights(self, logits_TE: Tensor, expert_TK: Tensor) -> Tensor:
        config = self.config
        if config.moe_router_score_function == "softmax":
            if config.moe_router_pre_softmax:
                weight_TK = logits_TE.softmax(-1).gather(1, expert_TK)
            else:
                weight_TK = logits_TE.gather(1, expert_TK).softmax(-1)
        else:
            weight_TK = logits_TE.gather(1, expert_TK).sigmoid()
            if config.moe_router_topk > 1:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        factor = config.moe_router_topk_scaling_factor
        return weight_TK if factor is None else weight_TK * factor

    def _count(self, expert_TK: Tensor, places: TokenPlaces) -> Tensor:
        chosen = torch.ones_like(expert_TK)
        if places.valid_T is not None:
            chosen = chosen * places.valid_T.unsqueeze(1)
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=expert_TK.device)
        return counts_E.scatter_add_(0, expert_TK.flatten(), chosen.flatten())

    def _balanced(self, num_tokens: int, device: torch.device) -> Tensor:
        """Every expert in turn."""
        chosen = self.config.moe_router_topk
        turns = torch.arange(num_tokens * chosen, device=device) % self.num_experts
        return turns.view(num_tokens, chosen).sort(dim=-1).values

    def _jittered(self, x_TH: Tensor, places: TokenPlaces) -> Tensor:
        eps = self.config.moe_input_jitter_eps
        if not eps or places.keys is None:
            return x_TH
        return x_TH * (1 + eps * symmetric_noise(places.keys(), x_TH.shape[1])).to(x_TH.dtype)


def in_best_groups(selection_TE: Tensor, *, num_groups: int, best: int, num_chosen: int) -> Tensor:
    """`selection_TE` with what lies outside the `best` groups of each token at minus infinity.

    A group's value is the sum of its num_chosen / best largest.
    """
    by_group_TGM = selection_TE.unflatten(-1, (num_groups, -1))
    value_TG = by_group_TGM.topk(num_chosen // best, dim=-1).values.sum(-1)
    is_best_TG = torch.zeros_like(value_TG, dtype=torch.bool).scatter_(1, value_TG.topk(best, dim=-1).indices, True)
    return by_group_TGM.masked_fill(~is_best_TG.unsqueeze(-1), -torch.inf).flatten(1)


def symmetric_noise(keys_T: Tensor, width: int) -> Tensor:
    """Numbers between -1 and 1, fp32 [T, width], by the bits that dropout uses (16 for each)."""
    words = child_keys(keys_T.unsqueeze(1), torch.arange(-(-width // 4), device=keys_T.device))
    return (words.view(torch.int16)[:, :width].float() + 0.5) / (1 << 15)


class _Logits(torch.autograd.Function):
    """W x in a wider dtype, of which x is kept as it is."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight: nn.Parameter, context: LayerContext, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TH)
        ctx.weight, ctx.context = weight, context
        return context.kernels.linear(x_TH.to(dtype), weight.to(dtype), None)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x_TH,) = ctx.saved_tensors
        context: LayerContext = ctx.context
        grad_TH = None
        if ctx.needs_input_grad[0]:
            grad_TH = context.kernels.input_gradient(grad_TE, ctx.weight.to(grad_TE.dtype)).to(x_TH.dtype)
        if ctx.weight.requires_grad:
            context.sink.add_linear(ctx.weight, None, grad_TE, x_TH.to(grad_TE.dtype), kernels=context.kernels)
        return grad_TH, None, None, None
