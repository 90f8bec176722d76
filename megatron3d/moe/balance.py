"""Losses that keep the load of experts even, each a sum over the global batch that does not depend on the layout.

With s_te the score of expert e for token t (they add up to 1), c_e how many tokens chose e, K choices of a token and E
experts, the losses of a layer are

    seq_aux_loss      per sequence of S tokens   E / (K S^2)  sum_e c_e sum_t s_te          mean over sequences
    global_aux_loss                              E  sum_e f_e s_te,  f_e = c_e / sum c      mean over tokens
    aux_loss          per micro-batch of T       E / (K T^2)  sum_e c_e sum_t s_te          mean over sequences
    router_z                                     (log sum_e exp l_te)^2                     mean over tokens

The first three are 1 where the load is even. In the second f is that of the step before (uniform before the first),
since the first backward of a pipeline begins before the last forward of the batch. The third depends on how the batch
is cut into micro-batches, so it is not the same at every layout; it is Megatron-LM's default.

A mean over tokens is one over those that the layer sees, where others pass it by (`nn/token_dropping.py`).

The objective has the sum over layers; logs show the mean. So a layer adds its loss divided by the number of expert
layers, and the weight is multiplied by it.

Source: Fedus et al. 2021 (arXiv:2101.03961), section 2.2; DeepSeek-AI 2024 (arXiv:2412.19437), equation 17, for the
loss of a sequence; Qiu et al. 2025 (arXiv:2501.11873) for the global batch; Zoph et al. 2022 (arXiv:2202.08906) for z.

Shapes: T tokens of this rank, B samples, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from megatron3d.comm.collectives import all_reduce
from megatron3d.config.sections.model import ModelConfig
from megatron3d.moe.router import Router, Routing, TokenPlaces
from megatron3d.nn.loss_sink import LossSink, LossSpec

Z_LOSS = "router_z"
_NAMES = {"seq_aux_loss": "seq_balance", "global_aux_loss": "global_balance", "aux_loss": "micro_batch_balance"}
_COUNTED = {"seq_aux_loss": "samples", "global_aux_loss": "positions", "aux_loss": "samples"}


def balance_specs(config: ModelConfig) -> tuple[LossSpec, ...]:
    """The losses that a model with these experts declares; none of a dense model."""
    layers = config.num_expert_layers
    if not layers:
        return ()
    specs = [
        LossSpec(_NAMES[kind], f"load balance of experts ({kind})", _COUNTED[kind], weight=weight * layers)
        for kind, weight in config.balance_losses
    ]
    if config.moe_z_loss_coeff:
        specs.append(
            LossSpec(Z_LOSS, "squared log-sum-exp of logits", "positions", weight=config.moe_z_loss_coeff * layers)
        )
    return tuple(specs)


def add_balance(x: Tensor, router: Router, routing: Routing, places: TokenPlaces, losses: LossSink) -> Tensor:
    """`x`, which flows on to the output, with this rank's terms of the layer's losses; all are partial over `tp`."""
    config = router.config
    layers = config.num_expert_layers
    logits_TE = routing.logits_TE
    for kind, _ in config.balance_losses:
        term = _TERMS[kind](router, routing, _of_tokens(router.scores(logits_TE), places), places)
        x = losses.add(x, _NAMES[kind], term.float() / layers, over_tp="partial")
    if config.moe_z_loss_coeff:
        squares_T = _of_tokens(logits_TE.logsumexp(-1, keepdim=True).square(), places)
        x = losses.add(x, Z_LOSS, squares_T.sum().float() / (layers * places.share), over_tp="partial")
    return x


def _of_tokens(values_TX: Tensor, places: TokenPlaces) -> Tensor:
    """Values with zeros where no token stands."""
    return values_TX if places.valid_T is None else values_TX * places.valid_T.unsqueeze(1)


def _by_sample(values_TE: Tensor, places: TokenPlaces) -> Tensor:
    """Sums over the tokens of each sample, [B, E]. Tokens stand position by position, so they are a stack of [B, E]."""
    return values_TE.unflatten(0, (-1, places.num_samples)).sum(0)


def _counts_by_sample(router: Router, routing: Routing, places: TokenPlaces) -> Tensor:
    """How many tokens of each sample chose each expert, all ranks together that have its tokens, [B, E]."""
    experts, samples = router.num_experts, places.num_samples
    place_TK = places.sample_T.unsqueeze(1) * experts + routing.expert_TK
    ones = torch.ones_like(routing.weight_TK.detach(), dtype=torch.float32)
    ones = _of_tokens(ones, places)
    counts = torch.zeros(samples * experts, dtype=torch.float32, device=place_TK.device)
    counts.scatter_add_(0, place_TK.flatten(), ones.flatten())
    return _of_whole_samples(router, counts, places).view(samples, experts)


def _of_whole_samples(router: Router, counts: Tensor, places: TokenPlaces) -> Tensor:
    """The sum of counts, which it may overwrite, over the ranks that have tokens of the same samples."""
    context = router.context
    axes = [context.tp] if places.position_T is None else [context.tp, context.cp]

    def summed() -> Tensor:
        for axis in axes:
            all_reduce(counts, axis)
        return counts

    return context.replay.run(summed)


def _of_sequences(router: Router, routing: Routing, scores_TE: Tensor, places: TokenPlaces) -> Tensor:
    counts_BE = _counts_by_sample(router, routing, places)
    factor = router.num_experts / (router.config.moe_router_topk * places.length**2)
    return (counts_BE * _by_sample(scores_TE, places)).sum() * factor


def _of_micro_batch(router: Router, routing: Routing, scores_TE: Tensor, places: TokenPlaces) -> Tensor:
    counts_E = _of_whole_samples(router, routing.counts_E.float(), places)
    tokens = places.length * places.num_samples
    factor = places.num_samples * router.num_experts / (router.config.moe_router_topk * tokens**2)
    return (counts_E * scores_TE.sum(0)).sum() * factor


def _of_global_batch(router: Router, routing: Routing, scores_TE: Tensor, places: TokenPlaces) -> Tensor:
    before_E = router.previous.to(scores_TE.dtype)
    total = before_E.sum()
    share_E = torch.where(total > 0, before_E / total.clamp_min(1), 1 / router.num_experts)
    return (share_E * scores_TE.sum(0)).sum() * (router.num_experts / places.share)


_Term = Callable[[Router, Routing, Tensor, TokenPlaces], Tensor]
_TERMS: Mapping[str, _Term] = MappingProxyType(
    {"seq_aux_loss": _of_sequences, "global_aux_loss": _of_global_batch, "aux_loss": _of_micro_batch}
)
