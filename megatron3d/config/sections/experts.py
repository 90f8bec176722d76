"""Mixtures of experts: which layers have one, how tokens are routed, and how the load is balanced; as it is given."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.fields import option, options, switch

BALANCE_LOSSES = ("seq_aux_loss", "global_aux_loss", "aux_loss")
DEFAULT_BALANCE_COEFFICIENT = 0.01
TRANSPORTS = ("alltoall", "allgather")


@dataclass(frozen=True)
class GivenExperts:
    """The options of expert layers. They mean nothing in a dense model, which has no or one expert."""

    num_experts: int | None = option(
        None,
        "--num-experts",
        "Experts of each expert layer, E; default none. One is a dense model, several numbers are a pyramid.",
        several="num_experts_by_layer",
    )
    num_experts_by_layer: tuple[str, ...] = options(
        "--num-experts-by-layer", "Experts of the first layer that has some, of the second ...: a pyramid."
    )
    moe_layer_freq: str = option(
        "1",
        "--moe-layer-freq",
        'Which layers have experts: 2 is every second from the first, 1::2 from the second, "([0]*3+[1]*9)" a list.',
    )
    moe_ffn_hidden_size: int | None = option(
        None, "--moe-ffn-hidden-size", "Width inside each expert; default --ffn-hidden-size."
    )
    moe_router_topk: int = option(2, "--moe-router-topk", "Experts that each token passes, K.", also=("--topk",))
    moe_router_score_function: str = option(
        "softmax", "--moe-router-score-function", "From logits to scores.", choices=("softmax", "sigmoid")
    )
    moe_router_pre_softmax: bool = switch(
        "--moe-router-pre-softmax", "Softmax over all experts before the choice; default over those chosen, after it."
    )
    moe_router_num_groups: int | None = option(
        None, "--moe-router-num-groups", "Groups of experts, of which each token chooses some first."
    )
    moe_router_group_topk: int | None = option(
        None, "--moe-router-group-topk", "Groups that each token may choose experts of."
    )
    moe_router_topk_scaling_factor: float | None = option(
        None, "--moe-router-topk-scaling-factor", "Factor of the weights of the chosen experts."
    )
    moe_router_dtype: str = option(
        "fp32", "--moe-router-dtype", "Precision of logits and scores.", choices=("fp32", "fp64")
    )
    moe_router_load_balancing_type: tuple[str, ...] = options(
        "--moe-router-load-balancing-type",
        f"Losses that balance the load, some of {', '.join(BALANCE_LOSSES)}, or none; default seq_aux_loss.",
    )
    moe_aux_loss_coeff: tuple[str, ...] = options(
        "--moe-aux-loss-coeff",
        f"Weight of each of these losses; default {DEFAULT_BALANCE_COEFFICIENT:g}.",
        also=("--moe-loss-coeff",),
    )
    moe_z_loss_coeff: float = option(
        0.0, "--moe-z-loss-coeff", "Weight of the mean squared log-sum-exp of the router's logits."
    )
    moe_input_jitter_eps: float = option(
        0.0, "--moe-input-jitter-eps", "Multiply what the router reads by random numbers from 1 - X to 1 + X."
    )
    moe_router_enable_expert_bias: bool = switch(
        "--moe-router-enable-expert-bias", "Balance by a bias of the choice that follows the load, without a gradient."
    )
    moe_router_bias_update_rate: float = option(
        1e-3, "--moe-router-bias-update-rate", "How far that bias moves in a step."
    )
    moe_router_force_load_balancing: bool = switch(
        "--moe-router-force-load-balancing", "Send equally many tokens to all experts, for benchmarks alone."
    )
    moe_expert_capacity_factor: float | None = option(
        None,
        "--moe-expert-capacity-factor",
        "Tokens of a sequence that an expert takes, over those of an even load; default all that choose it.",
        also=("--moe-train-capacity-factor",),
    )
    moe_min_capacity: int = option(
        0, "--moe-min-capacity", "Tokens of a sequence that it takes in any case.", unit="tokens"
    )
    moe_token_drop_policy: str = option(
        "probs",
        "--moe-token-drop-policy",
        "Which go first where more choose it: those of largest weight, the earlier, or in training random ones.",
        choices=("probs", "position", "random"),
    )
    moe_pad_expert_input_to_capacity: bool = switch(
        "--moe-pad-expert-input-to-capacity",
        "Fill the rows of every expert up to its capacity, so that no count is exchanged or read back.",
    )
    moe_token_dispatcher_type: str = option(
        "alltoall",
        "--moe-token-dispatcher-type",
        "How tokens reach the ranks of their experts: rows to these alone, or all tokens to all of them.",
        choices=TRANSPORTS,
    )
    moe_shared_expert_intermediate_size: int | None = option(
        None,
        "--moe-shared-expert-intermediate-size",
        "Width inside an expert that all tokens pass besides theirs; default none.",
    )
    moe_shared_expert_gate: bool = switch(
        "--moe-shared-expert-gate", "Multiply what the shared expert gives by a sigmoid of a learned score."
    )
    mlp_type: str = option(
        "standard",
        "--mlp-type",
        "What a layer with experts is: these alone, or (DeepSpeed-MoE) mixed with an MLP that all tokens pass.",
        choices=("standard", "residual"),
    )

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return (self.num_experts or 0) > 1 or bool(self.num_experts_by_layer)
