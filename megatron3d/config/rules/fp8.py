"""What must hold between the options of fp8, and between them and the model, its layout and its precision."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.options import OPTIONS
from megatron3d.config.sections.fp8 import FP8_RECIPES, GivenFp8
from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.optim import GivenOptim
from megatron3d.config.sections.parallel import ParallelConfig

_OTHER_RECIPES = {
    "delayed": "takes scales from the largest values of earlier steps, which would be state of the run",
    "mxfp8": "is for blocks of 32, which Blackwell GPUs multiply",
    "custom": "is for a recipe of the user's own",
}
_MULTIPLES = {"tensorwise": 16, "blockwise": 128}
_OF_FP8 = tuple(option for option in OPTIONS if option.name in GivenFp8.__dataclass_fields__)


def fp8_problems(fp8: GivenFp8, model: GivenModel, parallel: ParallelConfig, optim: GivenOptim) -> Iterator[str]:
    """A recipe that there is, in a run in bf16, for layers whose sizes suit it."""
    if fp8.fp8_format is None:
        yield from _without_effect(fp8)
        return
    if fp8.fp8_recipe not in FP8_RECIPES:
        why = _OTHER_RECIPES.get(fp8.fp8_recipe, "is not known")
        yield f"--fp8-recipe {fp8.fp8_recipe} {why}, and is not in this version; use {' or '.join(FP8_RECIPES)}."
    if not optim.bf16:
        yield (
            f"--fp8-format {fp8.fp8_format} casts layers that are bf16 otherwise, and this run computes in "
            f"{optim.precision}; give --bf16."
        )
    if parallel.overlap_chunks > 1:
        yield (
            f"--tp-comm-overlap cuts products into {parallel.overlap_chunks} chunks, and those of --fp8-format "
            f"{fp8.fp8_format} are whole; drop one of them."
        )
    yield from _layer_problems(fp8, model.num_layers)
    yield from _size_problems(fp8, model, parallel)


def _without_effect(fp8: GivenFp8) -> Iterator[str]:
    """Options of fp8 in a run without."""
    default = GivenFp8()
    for option in _OF_FP8:
        if getattr(fp8, option.name) != getattr(default, option.name):
            value = getattr(fp8, option.name)
            shown = option.spelling if isinstance(value, bool) else f"{option.spelling} {value}"
            yield f"{shown} is about fp8, and this run has none; give --fp8-format, or leave it out."


def _layer_problems(fp8: GivenFp8, num_layers: int | None) -> Iterator[str]:
    start, end = fp8.num_layers_at_start_in_bf16, fp8.num_layers_at_end_in_bf16
    counts = {"--num-layers-at-start-in-bf16": start, "--num-layers-at-end-in-bf16": end}
    for flag, count in counts.items():
        if count != 1 and not fp8.first_last_layers_bf16:
            yield f"{flag} {count} counts the layers that --first-last-layers-bf16 keeps in bf16; give it too."
    if fp8.first_last_layers_bf16 and start == end == 0:
        yield (
            "--first-last-layers-bf16 keeps no layer in bf16, as --num-layers-at-start-in-bf16 and "
            "--num-layers-at-end-in-bf16 are 0; leave it out, or give one of them a layer."
        )
    if fp8.first_last_layers_bf16 and num_layers and start + end >= num_layers:
        yield (
            f"--first-last-layers-bf16 keeps {start} + {end} layers in bf16, and --num-layers is {num_layers}, so none "
            "is left for --fp8-format; keep fewer, or drop one of them."
        )


def _size_problems(fp8: GivenFp8, model: GivenModel, parallel: ParallelConfig) -> Iterator[str]:
    """Sizes of which GPUs multiply fp8 matrices, and blocks that lie within the shards of a tensor."""
    tp, multiple = parallel.tensor_model_parallel_size, _MULTIPLES.get(fp8.fp8_recipe)
    if multiple is None:
        return
    shared = model.moe_shared_expert_intermediate_size if model.has_experts else None
    sizes = {
        "--hidden-size": (model.hidden_size, 1),
        "--ffn-hidden-size": (model.ffn_hidden_size, tp),
        "--moe-shared-expert-intermediate-size": (shared, tp),
        **{name: (size, tp) for name, size in _head_sizes(fp8, model).items()},
    }
    for name, (size, shards) in sizes.items():
        if size and size % (multiple * shards):
            over = f" over --tensor-model-parallel-size {tp}" if shards > 1 else ""
            yield (
                f"{name} {size}{over} is not a multiple of {multiple * shards}, and --fp8-recipe {fp8.fp8_recipe} "
                f"multiplies matrices whose sides, on each rank, are multiples of {multiple}; use another size, or "
                "leave --fp8-format out."
            )


def _head_sizes(fp8: GivenFp8, model: GivenModel) -> dict[str, int]:
    """The sides of the projections of attention; blocks lie within queries, keys and values, which are cut apart."""
    heads, groups, head = model.num_attention_heads, model.num_query_groups, model.kv_channels
    if not heads or not groups or not head:
        return {}
    queries = {"--num-attention-heads x --kv-channels": heads * head}
    if fp8.fp8_recipe == "blockwise":
        return queries | {"--num-query-groups x --kv-channels": groups * head}
    fused = "(--num-attention-heads + 2 x --num-query-groups) x --kv-channels"
    return queries | {fused: (heads + 2 * groups) * head}
