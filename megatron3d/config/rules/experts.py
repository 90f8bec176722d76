"""What must hold between the options of experts, and between them and the layout."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.architectures import named
from megatron3d.config.experts import balance_losses, expert_layers, experts_by_layer
from megatron3d.config.options import BY_NAME, OPTIONS
from megatron3d.config.sections.experts import GivenExperts
from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.parallel import ParallelConfig

_TP = "--tensor-model-parallel-size"
_OF_EXPERTS = tuple(option for option in OPTIONS if option.name in GivenExperts.__dataclass_fields__)


def expert_problems(model: GivenModel, parallel: ParallelConfig) -> Iterator[str]:
    """Experts, their router and the losses that balance them."""
    if not model.has_experts:
        yield from _without_experts(model, parallel)
        return
    yield from _router_problems(model)
    try:
        counts = _counts(model)
    except ValueError as error:
        yield str(error)
        counts = () if model.num_experts_by_layer else (model.num_experts or 0,)
    for experts in sorted(set(counts)):
        yield from _choice_problems(model, experts)
    try:
        balance_losses(model.moe_router_load_balancing_type, model.moe_aux_loss_coeff)
    except ValueError as error:
        yield f"{error}."
    if model.moe_min_capacity and model.moe_expert_capacity_factor is None:
        yield (
            f"--moe-min-capacity {model.moe_min_capacity} is the least capacity of experts that have one, and these "
            "take all tokens; give --moe-expert-capacity-factor too, or leave it out."
        )
    if model.moe_pad_expert_input_to_capacity and model.moe_expert_capacity_factor is None:
        yield (
            "--moe-pad-expert-input-to-capacity fills rows up to a capacity, and these experts take all tokens; give "
            "--moe-expert-capacity-factor too, or leave it out."
        )
    yield from _without_effect(model)
    shared = model.moe_shared_expert_intermediate_size
    if model.mlp_type == "residual" and (shared or model.moe_shared_expert_gate):
        option = f"--moe-shared-expert-intermediate-size {shared}" if shared else "--moe-shared-expert-gate"
        yield (
            f"--mlp-type residual has an MLP that all tokens pass already, mixed by learned weights, and {option} asks "
            "for another; leave one out."
        )
    elif model.moe_shared_expert_gate and not model.moe_shared_expert_intermediate_size:
        yield (
            "--moe-shared-expert-gate is the gate of a shared expert, and there is none; give "
            "--moe-shared-expert-intermediate-size too."
        )
    yield from _layout_problems(model, parallel, counts)


def _counts(model: GivenModel) -> tuple[int, ...]:
    """The numbers of experts of the layers that have some.

    Raises:
        ValueError: there are no such layers; its message is a sentence.
    """
    if not model.num_layers:
        return (model.num_experts or 0,)
    try:
        has_experts = expert_layers(model.moe_layer_freq, model.num_layers)
    except ValueError as error:
        raise ValueError(
            f"--moe-layer-freq {model.moe_layer_freq} {error}; give 1 for experts in every layer."
        ) from error
    if not any(has_experts):
        raise ValueError(
            f"--moe-layer-freq {model.moe_layer_freq} leaves no layer with experts; leave out --num-experts too."
        )
    if not model.num_experts_by_layer:
        return (model.num_experts or 0,)
    given = " ".join(model.num_experts_by_layer)
    try:
        counts = experts_by_layer(model.num_experts_by_layer, has_experts)
    except ValueError as error:
        raise ValueError(f"--num-experts {given} {error}; give one number, or one for each of these.") from error
    if model.num_experts != max(counts):
        raise ValueError(
            f"--num-experts {model.num_experts} and --num-experts-by-layer {given} contradict each other; give one "
            "of them."
        )
    return tuple(count for count in counts if count)


def _without_experts(model: GivenModel, parallel: ParallelConfig) -> Iterator[str]:
    """Options of experts where there are none; beside --num-experts 1, which asks for a dense model, they mean
    nothing."""
    if model.num_experts is None:
        for option in _OF_EXPERTS:
            value = vars(model)[option.name]
            if value != option.default:
                text = " ".join(value) if isinstance(value, tuple) else "" if value is True else str(value)
                flag = f"{option.spelling} {text}".strip()
                yield f"{flag} is about experts; give --num-experts, or leave it out."
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    for option, size in (("--expert-model-parallel-size", ep), ("--expert-tensor-parallel-size", etp)):
        if (size or 1) > 1:
            yield (
                f"{option} {size} shards experts, and {named(model.architecture)} without --num-experts has none; "
                "use 1."
            )


def _without_effect(model: GivenModel) -> Iterator[str]:
    """Options about something that other options leave out."""
    policy, rate = BY_NAME["moe_token_drop_policy"], BY_NAME["moe_router_bias_update_rate"]
    if model.moe_token_drop_policy != policy.default and model.moe_expert_capacity_factor is None:
        yield (
            f"--moe-token-drop-policy {model.moe_token_drop_policy} is about experts with a capacity, and these take "
            "all tokens; give --moe-expert-capacity-factor too, or leave it out."
        )
    if model.moe_router_bias_update_rate != rate.default and not model.moe_router_enable_expert_bias:
        yield (
            f"--moe-router-bias-update-rate {model.moe_router_bias_update_rate:g} is about the bias of experts, and "
            "there is none; give --moe-router-enable-expert-bias too, or leave it out."
        )
    coefficients = " ".join(model.moe_aux_loss_coeff)
    if model.moe_router_load_balancing_type == ("none",) and coefficients.strip("0. "):
        yield (
            f"--moe-aux-loss-coeff {coefficients} is the weight of a loss, and --moe-router-load-balancing-type none "
            "has no loss; leave one out."
        )


def _router_problems(model: GivenModel) -> Iterator[str]:
    """A router that gets a gradient, and a bias that means something."""
    is_sigmoid = model.moe_router_score_function == "sigmoid"
    if model.moe_router_topk == 1 and not is_sigmoid and not model.moe_router_pre_softmax:
        yield (
            "--moe-router-topk 1 with a softmax over the one chosen expert gives every token the weight 1, so that the "
            "router would never learn; add --moe-router-pre-softmax."
        )
    if model.moe_router_pre_softmax and is_sigmoid:
        yield "--moe-router-pre-softmax is about softmax, and --moe-router-score-function is sigmoid; leave one out."
    if model.moe_router_enable_expert_bias and not is_sigmoid:
        yield (
            "--moe-router-enable-expert-bias moves the choice among scores that do not depend on each other; use "
            "--moe-router-score-function sigmoid."
        )


def _choice_problems(model: GivenModel, experts: int) -> Iterator[str]:
    """As many experts of a layer as are chosen, of as many groups."""
    chosen = model.moe_router_topk
    groups, of_groups = model.moe_router_num_groups, model.moe_router_group_topk
    if chosen > experts:
        yield f"--moe-router-topk {chosen} chooses among {experts} experts (--num-experts); use at most {experts}."
    if (groups is None) != (of_groups is None):
        given, missing = "--moe-router-num-groups", "--moe-router-group-topk"
        if groups is None:
            given, missing = missing, given
        yield f"{given} {groups or of_groups} needs {missing}; give both or neither."
    if groups is None or of_groups is None:
        return
    if experts % groups:
        yield f"--moe-router-num-groups {groups} does not divide --num-experts {experts}; use a divisor of it."
    elif of_groups > groups or chosen % of_groups or chosen // of_groups > experts // groups:
        yield (
            f"--moe-router-topk {chosen} experts cannot be {chosen}/{of_groups} of each of {of_groups} groups "
            f"(--moe-router-group-topk) of {groups} with {experts // groups} experts each; use a "
            f"--moe-router-group-topk of at most {groups} that divides {chosen} into at most {experts // groups}."
        )


def _layout_problems(model: GivenModel, parallel: ParallelConfig, counts: tuple[int, ...]) -> Iterator[str]:
    """Every rank of the two axes of experts holds equal parts of the same number of experts."""
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    etp = parallel.expert_tensor_parallel_size or tp
    for experts in sorted(set(counts)):
        if experts % ep:
            yield f"--expert-model-parallel-size {ep} does not divide --num-experts {experts}; use a divisor of it."
    ranks, each = parallel.world_size // parallel.pipeline_model_parallel_size, etp * ep
    if ranks % each:
        yield (
            f"--expert-model-parallel-size {ep} x expert tensor {etp} (--expert-tensor-parallel-size) = {each} does "
            f"not divide the {ranks} ranks of a pipeline stage, which hold the experts; use sizes whose product does."
        )
    size = parallel.zero_shard_size
    if size and (tp * size) % each and each % (tp * size):
        yield (
            f"--zero-shard-size {size} x tensor {tp} = {tp * size} consecutive ranks are no whole number of the {each} "
            "ranks that hold all experts once, nor a part of them; use sizes of which one divides the other."
        )
    for option, width, cut, degree in (
        (
            "--moe-ffn-hidden-size",
            model.moe_ffn_hidden_size or model.ffn_hidden_size,
            "--expert-tensor-parallel-size",
            etp,
        ),
        ("--moe-shared-expert-intermediate-size", model.moe_shared_expert_intermediate_size, _TP, tp),
        ("--moe-ffn-hidden-size", model.moe_ffn_hidden_size if model.mlp_type == "residual" else None, _TP, tp),
    ):
        if width and width % degree:
            yield f"{option} {width} is not a multiple of {cut} {degree}, which cuts it; use another width."
