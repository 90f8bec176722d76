"""What must hold between the options of the model and of the layout.

Each rule takes the sections it needs and yields sentences. A section named `given` is as the user gave it (values
outside their own range set back to the default); one named by what it is has the derived values too, where it matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from megatron3d.config.architectures import ARCHITECTURES, named
from megatron3d.config.derive import model_parallel_size
from megatron3d.config.rules.experts import expert_problems
from megatron3d.config.rules.pipeline import pipeline_problems
from megatron3d.config.rules.rotary import rotary_rule
from megatron3d.config.run import DraftRun, GivenRun
from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.parallel import ParallelConfig


def model_and_layout_problems(given: GivenRun, run: DraftRun) -> Iterator[str]:
    """What no model can be, or cannot be cut into, whichever the run."""
    yield from attention_rule(given.model, run.model)
    yield from rotary_rule(given.model, run.model)
    yield from activation_rule(given.model, run.model)
    yield from positions_rule(run.model)
    yield from architecture_rule(given.model, run.model)
    yield from world_size_rule(run.parallel)
    yield from tensor_parallel_rule(run.model, run.parallel)
    yield from pipeline_problems(given.parallel, run.parallel, run.model.num_layers)
    yield from expert_problems(run.model, run.parallel)
    yield from zero_rule(run.parallel)


def attention_rule(given: GivenModel, model: GivenModel) -> Iterator[str]:
    """Heads share the hidden size, and groups share the heads."""
    hidden, heads, groups = model.hidden_size, model.num_attention_heads, model.num_query_groups
    if hidden and heads and given.kv_channels is None and hidden % heads:
        below = hidden // heads * heads
        sizes = f"{below} or {below + heads}" if below else str(heads)
        yield (
            f"--hidden-size {hidden} is not a multiple of --num-attention-heads {heads}, so heads have no whole size; "
            f"use --hidden-size {sizes}, or give --kv-channels."
        )
    if heads and groups and heads % groups:
        yield (
            f"--num-query-groups {groups} does not divide --num-attention-heads {heads}; use one of "
            f"{_divisors_text(heads)}."
        )
    if model.qk_layernorm_across_heads and not model.qk_layernorm:
        yield (
            "--qk-layernorm-across-heads is about the norms of queries and keys, and there are none; give "
            "--qk-layernorm too."
        )
    if model.qk_layernorm_across_heads and model.normalization != "RMSNorm":
        yield (
            f"--qk-layernorm-across-heads is an RMSNorm, and --normalization is {model.normalization}; use "
            "--normalization RMSNorm, or leave it out."
        )


def activation_rule(given: GivenModel, model: GivenModel) -> Iterator[str]:
    """One activation, in an MLP of some width."""
    wanted = {
        "--swiglu": ("swiglu", given.swiglu),
        "--squared-relu": ("squared_relu", given.squared_relu),
        "--openai-gelu": ("gelu_tanh", given.openai_gelu),
        f"--activation {given.activation}": (given.activation, given.activation is not None),
    }
    asked = {flag: activation for flag, (activation, is_given) in wanted.items() if is_given}
    if len(set(asked.values())) > 1:
        yield f"{' and '.join(asked)} ask for different activations; give only one of them."
    if model.ffn_hidden_size == 0:
        yield (
            f"--hidden-size {model.hidden_size} with {model.activation} gives an MLP of width 0; give "
            "--ffn-hidden-size."
        )


def positions_rule(model: GivenModel) -> Iterator[str]:
    """A sample fits into the positions."""
    length, positions = model.seq_length, model.max_position_embeddings
    if length and positions and length > positions:
        yield (
            f"--seq-length {length} is longer than --max-position-embeddings {positions}; use --seq-length {positions} "
            f"or --max-position-embeddings {length}."
        )


def architecture_rule(given: GivenModel, model: GivenModel) -> Iterator[str]:
    """Options that belong to one architecture stand with that one."""
    traits = model.traits
    used = {
        "norm_position": ("--norm-position post", model.norm_position == "post"),
        "bert_binary_head": ("--bert-no-binary-head", not model.bert_binary_head),
        "num_token_types": (f"--num-token-types {given.num_token_types}", bool(given.num_token_types)),
        "num_experts": (f"--num-experts {given.num_experts}", model.has_experts),
    }
    for name, (words, is_used) in used.items():
        if is_used and name not in traits.own_options:
            owner = next(other for other in ARCHITECTURES.values() if name in other.own_options)
            yield f"{words} means nothing to {named(model.architecture)}; leave it out, or use {owner.script}."
    if model.has_binary_head and model.num_token_types == 1:
        yield (
            "--num-token-types 1 cannot tell the two sentences of a sample apart; use 2, 0 for no table at all, or "
            "--bert-no-binary-head."
        )
    is_post = "norm_position" in traits.own_options and model.norm_position == "post"
    if is_post and model.apply_residual_connection_post_layernorm:
        yield (
            "--apply-residual-connection-post-layernorm is about norms before each half of a block; leave it out, "
            "or use --norm-position pre."
        )


def world_size_rule(parallel: ParallelConfig) -> Iterator[str]:
    """The ranks factor into tensor x pipeline x context x data."""
    size, world = model_parallel_size(parallel), parallel.world_size
    if world % size:
        tp, pp, cp = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        context, third = (f" x context {cp}", ", --context-parallel-size") if cp > 1 else ("", "")
        above = -(-world // size) * size
        counts = f"{above - size} or {above}" if above > size else str(above)
        yield (
            f"A world of {world} ranks is not a multiple of tensor {tp} x pipeline {pp}{context} = {size}; start "
            f"{counts} ranks, or change --tensor-model-parallel-size{third} or --pipeline-model-parallel-size so that "
            f"their product divides {world}."
        )


def tensor_parallel_rule(model: GivenModel, parallel: ParallelConfig) -> Iterator[str]:
    """Each tensor-parallel rank gets the same number of heads, groups, FFN columns and, if so asked, positions; or an
    equal part of one group's key and value heads."""
    tp = parallel.tensor_model_parallel_size
    sizes = _sizes_cut_by_tensor_parallelism(model, parallel)
    common = math.gcd(*(value for value in sizes.values() if value))
    possible = _divisors_text(max(1, common), fits=lambda size: _fits_query_groups(model, size))
    for option, value in sizes.items():
        if value and value % tp:
            yield (
                f"{option} {value} is not a multiple of --tensor-model-parallel-size {tp}, which cuts it; use "
                f"--tensor-model-parallel-size {possible}, or another {option}."
            )
    groups = model.num_query_groups
    if groups and groups != model.num_attention_heads and not _fits_query_groups(model, tp):
        reason = (
            f"does not divide --tensor-model-parallel-size {tp}, nor does that divide it"
            if tp % groups
            else f"makes {tp // groups} of --tensor-model-parallel-size {tp} ranks share a key and value head, whose "
            f"size --kv-channels {model.kv_channels} is not a multiple of that"
        )
        yield (
            f"--num-query-groups {groups} {reason}; use --tensor-model-parallel-size {possible}, or another "
            "--num-query-groups."
        )


def _fits_query_groups(model: GivenModel, tp: int) -> bool:
    """Whether every tensor-parallel rank gets whole key and value heads, or an equal part of one."""
    groups, head = model.num_query_groups, model.kv_channels
    if not groups or not head or groups % tp == 0:
        return True
    return tp % groups == 0 and head % (tp // groups) == 0


def _sizes_cut_by_tensor_parallelism(model: GivenModel, parallel: ParallelConfig) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {
        "--num-attention-heads": model.num_attention_heads,
        "--ffn-hidden-size": model.ffn_hidden_size,
    }
    if parallel.sequence_parallel and parallel.context_parallel_size == 1:  # else see `rules/context.py`
        sizes["--seq-length (with --sequence-parallel)"] = model.seq_length
    return sizes


def zero_rule(parallel: ParallelConfig) -> Iterator[str]:
    """Ranks that shard state form equal groups of the ranks that sum gradients, and there is state to shard."""
    size, dp = parallel.zero_shard_size, parallel.data_parallel_size * parallel.context_parallel_size
    if size is None:
        return
    if parallel.zero_stage == 0:
        yield (
            f"--zero-shard-size {size} shards nothing with --zero-stage 0; give --zero-stage 1, 2 or 3, or leave "
            "it out."
        )
    if dp % size:
        yield (
            f"--zero-shard-size {size} does not divide the {dp} data-parallel ranks; use {_divisors_text(dp)}, or "
            "leave it out to shard over all of them."
        )


def _divisors_text(number: int, *, fits: Callable[[int], bool] = lambda divisor: True) -> str:
    """The divisors of a positive number that fit as "1, 2 or 4"."""
    divisors = [str(d) for d in range(1, number + 1) if number % d == 0 and fits(d)]
    if len(divisors) > 8:
        divisors = [*divisors[:7], f"another divisor of {number}"]
    return divisors[0] if len(divisors) == 1 else f"{', '.join(divisors[:-1])} or {divisors[-1]}"
