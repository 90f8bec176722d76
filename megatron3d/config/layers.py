"""Layers of settings: what a higher one, such as the flags, leaves of a lower one, such as a config file.

A setting replaces that of the same option below it. It also replaces those of other options that decide the same
thing: `--fp16` over a file with `bf16 = true` is fp16, and not two precisions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron3d.config.derive import TOKENIZER_ALIASES
from megatron3d.config.options import Settings

# What several options decide in different ways. A way may take several options, which go together.
_WAYS: tuple[tuple[str, ...], ...] = (
    ("activation", "swiglu", "squared_relu", "openai_gelu"),
    ("bf16", "fp16"),
    ("num_experts", "num_experts_by_layer"),
    ("zero_stage", "use_distributed_optimizer"),
    ("train_iters", "train_samples", "train_tokens"),
    ("global_batch_size", "gradient_accumulation_steps"),
    ("rampup_batch_size", "step_batch_size_schedule"),
    ("recompute_granularity recompute_method recompute_num_layers", "recompute_activations"),
    ("lr_decay_iters", "lr_decay_samples", "lr_decay_tokens"),
    ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens", "lr_warmup_fraction"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ("data_path", "train_data_path valid_data_path test_data_path", "data_args_path", "mock_data"),
    (
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
    ),
    (
        "pipeline_model_parallel_layout",
        "pipeline_split_costs",
        "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split",
    ),
    ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"),
)
_TOKENIZER_FILES = ("vocab_file", "merge_file", "tokenizer_model")


def layered(lower: Settings, upper: Settings) -> dict[tuple[str, str], Any]:
    """The settings of both layers, without those of the lower one that the upper one decides."""
    replaced = {*_other_ways(upper), *(_TOKENIZER_FILES if names_other_tokenizer(lower, upper) else ())}
    return {key: value for key, value in lower.items() if key[1] not in replaced} | dict(upper)


def _other_ways(upper: Settings) -> Iterator[str]:
    """The options beside those that are set, of whatever these decide; a switch that is off decides nothing."""
    set_names = {name for (_, name), value in upper.items() if value is not False}
    for ways in _WAYS:
        chosen = [way for way in ways if set_names.intersection(way.split())]
        if chosen:
            yield from (name for way in ways if way not in chosen for name in way.split())


def names_other_tokenizer(lower: Settings, upper: Settings) -> bool:
    """Whether the upper layer names a tokenizer of another kind, or another directory that describes one."""
    key = ("data", "tokenizer_type")
    kinds = {TOKENIZER_ALIASES.get(one[key], one[key]) for one in (lower, upper) if one.get(key) is not None}
    is_other_directory = kinds == {"HuggingFaceTokenizer"} and ("data", "tokenizer_model") in upper
    return len(kinds) > 1 or is_other_directory
