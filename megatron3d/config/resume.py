"""What a change of each option means to a run that resumes a checkpoint: one table over all fields of all sections.

Every field has exactly one effect. FUNCTION changes what the weights compute: never resumed. EXTENSION does so too, but
is how the context of trained weights is extended: a run never resumes with a change of it, and one that starts from the
weights (--finetune, --pretrained-checkpoint) reports it in a line. SAMPLES changes what "so many consumed samples"
means: resumed only with --override-sample-order. REPORTED changes how training goes on, which people do on purpose:
reported in a line. FREE changes neither: layout, memory, kernels, logging, paths.

Some options have no value that could be compared: token files and tokenizers are compared by content
(`data/content.py`), and the options of the learning-rate schedule by the schedule that they give
(`optim/schedule.py`). They are in the table like all others and skipped by `differences`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

from megatron3d.config.options import BY_KEY, SECTIONS
from megatron3d.config.run import RunConfig
from megatron3d.config.sample_counts import train_samples_asked_for

Key = tuple[str, str]


class Effect(Enum):
    """What a change of an option means to a resumed run."""

    FUNCTION = "function"
    EXTENSION = "extension"
    SAMPLES = "samples"
    REPORTED = "reported"
    FREE = "free"


# Section -> effect -> names of fields.
_TABLE: Mapping[str, Mapping[Effect, str]] = MappingProxyType(
    {
        "model": {
            Effect.FUNCTION: (
                "architecture num_layers hidden_size num_attention_heads max_position_embeddings ffn_hidden_size "
                "kv_channels num_query_groups vocab_size position_embedding_type rotary_percent "
                "rotary_interleaved normalization norm_epsilon apply_layernorm_1p norm_position "
                "activation add_bias_linear add_qkv_bias "
                "qk_layernorm qk_layernorm_across_heads untie_embeddings_and_output_weights "
                "apply_residual_connection_post_layernorm "
                "bert_binary_head num_token_types "
                "num_experts num_experts_by_layer mlp_type moe_layer_freq moe_ffn_hidden_size moe_router_topk "
                "moe_router_score_function "
                "moe_router_pre_softmax moe_router_num_groups moe_router_group_topk moe_router_topk_scaling_factor "
                "moe_router_dtype moe_expert_capacity_factor moe_min_capacity moe_token_drop_policy "
                "moe_router_enable_expert_bias moe_router_force_load_balancing "
                "moe_shared_expert_intermediate_size moe_shared_expert_gate"
            ),
            Effect.EXTENSION: (
                "rotary_base rotary_scaling rotary_scaling_factor rotary_original_max_position_embeddings "
                "rotary_low_freq_factor rotary_high_freq_factor rotary_attention_factor yarn_beta_fast yarn_beta_slow "
                "mscale mscale_all_dim yarn_correction_range_round_to_int"
            ),
            Effect.SAMPLES: "seq_length",
            Effect.REPORTED: (
                "hidden_dropout attention_dropout moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff "
                "moe_input_jitter_eps moe_router_bias_update_rate"
            ),
            # The switches are in activation and num_query_groups, the interpolation in rotary_scaling and its factor;
            # stored tables have no padding; the initial weights are past.
            Effect.FREE: (
                "swiglu squared_relu openai_gelu group_query_attention rotary_seq_len_interpolation_factor "
                "make_vocab_size_divisible_by init_method_std "
                "moe_pad_expert_input_to_capacity moe_token_dispatcher_type"
            ),
        },
        "parallel": {
            Effect.REPORTED: "grad_reduce_in_bf16 offload_delayed_update",
            Effect.FREE: (
                "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
                "cp_cut cp_comm_type hierarchical_context_parallel_sizes cp_gather_again context_cut "
                "expert_model_parallel_size expert_tensor_parallel_size sequence_parallel tp_comm_overlap "
                "tp_comm_overlap_chunks pipeline_schedule "
                "num_layers_per_virtual_pipeline_stage "
                "num_virtual_stages_per_pipeline_rank microbatch_group_size_per_virtual_pipeline_stage "
                "pipeline_model_parallel_layout pipeline_split_costs pipeline_memory_limit_gb "
                "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers "
                "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split zero_stage "
                "zero_shard_size zero_prefetch_units use_distributed_optimizer overlap_grad_reduce "
                "overlap_param_gather offload_optimizer offload_params offload_activations offload_dir "
                "device distributed_timeout_minutes "
                "data_parallel_size world_size virtual_stages"
            ),
        },
        "train": {
            Effect.REPORTED: (
                "global_batch_size rampup_batch_size step_batch_size_schedule iterations_to_skip freeze_params matmul "
                "fp32_matmul_precision "
                "random_ltd random_ltd_min random_ltd_max random_ltd_steps random_ltd_step_size random_ltd_layers "
                "random_ltd_router "
                "fp8_format fp8_recipe fp8_wgrad first_last_layers_bf16 num_layers_at_start_in_bf16 "
                "num_layers_at_end_in_bf16"
            ),
            # batch_size_steps is step_batch_size_schedule in samples; accumulation steps are in global_batch_size;
            # length_levels and splits_samples are the curriculum of `lengths`.
            Effect.FREE: (
                "micro_batch_size gradient_accumulation_steps train_iters train_samples train_tokens "
                "eval_interval eval_iters exit_interval "
                "exit_duration_in_mins exit_signal_handler log_interval tensorboard_dir wandb_project wandb_exp_name "
                "wandb_entity wandb_save_dir metrics_file check_weight_hash_across_dp_replicas_interval "
                "recompute_granularity recompute_activations recompute_method "
                "recompute_num_layers recompute_reuse_communication loss_chunk_size mlp_chunks_for_training "
                "attention_backend packed_attention kernels compile peak_tflops profile_pipeline profile_pipeline_step "
                "batch_size_steps length_levels splits_samples "
                "profile profile_step_start profile_step_end profile_ranks profile_dir"
            ),
        },
        "lengths": {
            Effect.REPORTED: (
                "seq_length_curriculum seq_length_curriculum_pacing seq_length_curriculum_min_difficulty "
                "seq_length_curriculum_max_difficulty seq_length_curriculum_steps "
                "seq_length_curriculum_difficulty_step seq_length_curriculum_root_degree "
                "seq_length_curriculum_difficulties seq_length_curriculum_last_steps"
            ),
        },
        "optim": {
            Effect.REPORTED: (
                "optimizer lr min_lr lr_decay_style lr_decay_iters lr_decay_samples lr_warmup_iters "
                "lr_warmup_samples lr_decay_tokens lr_warmup_tokens lr_warmup_fraction lr_warmup_init "
                "lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples weight_decay start_weight_decay "
                "end_weight_decay weight_decay_incr_style "
                "clip_grad adam_beta1 adam_beta2 adam_eps decoupled_weight_decay exp_avg_dtype exp_avg_sq_dtype "
                "sgd_momentum lion_beta1 lion_beta2 muon_momentum muon_nesterov muon_split_qkv muon_scale_mode "
                "muon_extra_scale_factor muon_coefficient_type muon_num_ns_steps muon_fp32_matmul_prec "
                "muon_scalar_optimizer bf16 fp16 loss_scale initial_loss_scale min_loss_scale loss_scale_window "
                "hysteresis check_for_nan_in_loss_and_grad"
            ),
            Effect.FREE: "optimizer_implementation",
        },
        "data": {
            # What a token attends to, and which position it has.
            Effect.FUNCTION: "reset_position_ids reset_attention_mask eod_token",
            # The seed also draws dropout.
            Effect.SAMPLES: (
                "data_path train_data_path data_args_path split sample_order sample_order_samples "
                "sample_order_consumed mid_level_dataset_surplus mock_data tokenizer_type tokenizer_model vocab_file "
                "merge_file tiktoken_pattern tiktoken_num_special_tokens tiktoken_special_tokens "
                "eod_mask_loss mask_prob mask_max_ngram mask_whole_words short_seq_prob bert_sentence_task "
                "seed"
            ),
            # Fill-in-the-Middle changes the form of samples, not which they are.
            Effect.REPORTED: (
                "fim_data fim_rate fim_spm_rate fim_split_sample fim_fragment_rate fim_no_prefix fim_prefix_token "
                "fim_middle_token fim_suffix_token fim_pad_token fim_eod_token valid_data_path test_data_path "
                "data_temperature"
            ),
            Effect.FREE: "num_workers dataloader_check_ids multiple_validation_sets validation_set_names",
        },
        "curriculum": {
            Effect.SAMPLES: (
                "curriculum_metric curriculum_difficulty_type curriculum_min_difficulty curriculum_max_difficulty "
                "curriculum_pacing curriculum_steps curriculum_difficulty_step curriculum_root_degree "
                "curriculum_difficulties curriculum_last_steps curriculum_warmup_steps curriculum_seed"
            ),
            # The files may move; that they are of this data is compared when they are opened. The share of a warm-up is
            # in its steps.
            Effect.FREE: "curriculum_index curriculum_deepspeed_index curriculum_warmup_fraction",
        },
        "checkpoint": {
            Effect.FREE: (
                "save load pretrained_checkpoint save_interval async_save keep_last save_retain_interval ckpt_step "
                "finetune "
                "no_load_optim no_save_optim override_opt_param_scheduler use_checkpoint_opt_param_scheduler "
                "fall_back_to_previous_checkpoint exit_on_missing_checkpoint override_sample_order override_tokenizer "
                "use_checkpoint_args"
            ),
        },
    }
)

EFFECTS: Mapping[Key, Effect] = MappingProxyType(
    {
        (section, name): effect
        for section, by_effect in _TABLE.items()
        for effect, names in by_effect.items()
        for name in names.split()
    }
)

_BY_CONTENT = (
    "data_path train_data_path valid_data_path test_data_path data_args_path data_temperature tokenizer_type "
    "tokenizer_model vocab_file merge_file"
)
_BY_SCHEDULE = (
    "lr min_lr lr_decay_style lr_decay_iters lr_decay_samples lr_warmup_iters lr_warmup_samples "
    "lr_decay_tokens lr_warmup_tokens lr_warmup_fraction "
    "lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples weight_decay start_weight_decay "
    "end_weight_decay weight_decay_incr_style"
)
COMPARED_ELSEWHERE: frozenset[Key] = frozenset(
    [("data", name) for name in _BY_CONTENT.split()] + [("optim", name) for name in _BY_SCHEDULE.split()]
)


def _has(section: str, name: str, *values: Any) -> Callable[[RunConfig], bool]:
    return lambda run: getattr(getattr(run, section), name) in values


_IS_ROTARY = _has("model", "position_embedding_type", "rope")
_IS_YARN = _has("model", "rotary_scaling", "yarn")
_IS_LLAMA3 = _has("model", "rotary_scaling", "llama3")
_USES_ADAM = _has("optim", "optimizer", "adam", "adamw", "lamb", "muon")
_IS_FP16 = _has("optim", "fp16", True)
_HAS_FP8 = _has("train", "fp8_format", "e4m3", "hybrid")
_KEEPS_BF16 = _has("train", "first_last_layers_bf16", True)


def _masks_sentences(run: RunConfig) -> bool:
    return run.model.traits.samples == "sentences"


def _depends_on_eod(run: RunConfig) -> bool:
    data = run.data
    return data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss or data.mock_data


# Options that have an effect only where others say so, in both runs; else the others differ and speak for themselves.
_RELEVANT: Mapping[Key, Callable[[RunConfig], bool]] = MappingProxyType(
    {
        ("model", "max_position_embeddings"): _has("model", "position_embedding_type", "learned_absolute"),
        **{("model", name): _IS_ROTARY for name in ("rotary_base", "rotary_percent", "rotary_interleaved")},
        ("model", "rotary_original_max_position_embeddings"): _has("model", "rotary_scaling", "yarn", "llama3"),
        **{("model", f"rotary_{name}_freq_factor"): _IS_LLAMA3 for name in ("low", "high")},
        **{
            ("model", name): _IS_YARN for _, name in EFFECTS if name.startswith(("yarn_", "mscale", "rotary_attention"))
        },
        **{("train", name): _HAS_FP8 for name in ("fp8_recipe", "fp8_wgrad", "first_last_layers_bf16")},
        **{("train", f"num_layers_at_{end}_in_bf16"): _KEEPS_BF16 for end in ("start", "end")},
        ("train", "matmul"): lambda run: run.optim.precision == "fp32" and run.parallel.device != "cuda",
        ("model", "add_qkv_bias"): _has("model", "add_bias_linear", False),
        ("model", "bert_binary_head"): lambda run: "bert_binary_head" in run.model.traits.own_options,
        ("data", "eod_token"): _depends_on_eod,
        **{
            ("data", name): _has("data", "sample_order", "megatron")
            for name in ("sample_order_samples", "sample_order_consumed", "mid_level_dataset_surplus")
        },
        **{
            ("data", name): _has("data", "fim_data", True)
            for _, name in EFFECTS
            if name.startswith("fim_") and name != "fim_data"
        },
        ("data", "split"): lambda run: bool(run.data.data_path or run.data.data_args_path),
        **{
            ("data", name): _masks_sentences
            for name in ("mask_prob", "mask_max_ngram", "mask_whole_words", "short_seq_prob", "bert_sentence_task")
        },
        **{("optim", name): _USES_ADAM for name in ("adam_beta1", "adam_beta2", "adam_eps", "exp_avg_sq_dtype")},
        ("optim", "decoupled_weight_decay"): _USES_ADAM,
        ("optim", "exp_avg_dtype"): _has("optim", "optimizer", "adam", "adamw", "lamb", "lion", "muon"),
        ("optim", "sgd_momentum"): _has("optim", "optimizer", "sgd"),
        **{("optim", name): _has("optim", "optimizer", "lion", "muon") for name in ("lion_beta1", "lion_beta2")},
        **{("optim", key): _has("optim", "optimizer", "muon") for _, key in EFFECTS if key.startswith("muon_")},
        ("optim", "loss_scale"): _IS_FP16,
        **{
            ("optim", name): lambda run: run.optim.fp16 and run.optim.loss_scale is None
            for name in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
        },
    }
)


@dataclass(frozen=True)
class Difference:
    """One option that a run and the checkpoint it resumes have with different values."""

    effect: Effect
    option: str
    saved: str
    now: str

    def __str__(self) -> str:
        return f"{self.option}: checkpoint {self.saved}, this run {self.now}"


_BATCHES = frozenset(("train", name) for name in ("global_batch_size", "rampup_batch_size", "step_batch_size_schedule"))


def differences(saved: RunConfig, now: RunConfig) -> list[Difference]:
    """The options in which two resolved runs differ, but for the free ones and those compared elsewhere."""
    # Under a curriculum the bound of a sample is that of its step, which batches decide.
    has_curriculum = bool(saved.curriculum.curriculum_metric and now.curriculum.curriculum_metric)
    found = [
        Difference(
            Effect.SAMPLES if has_curriculum and key in _BATCHES else effect,
            _label(key),
            _shown(key, _value(saved, key)),
            _shown(key, _value(now, key)),
        )
        for key, effect in _compared()
        if _is_relevant(key, saved) and _is_relevant(key, now) and not _agree(key, saved, now)
    ]
    return list(dict.fromkeys(found))


def _compared() -> Iterator[tuple[Key, Effect]]:
    """Keys in the order of the sections."""
    for section in SECTIONS:
        for key, effect in EFFECTS.items():
            if key[0] == section and effect is not Effect.FREE and key not in COMPARED_ELSEWHERE:
                yield key, effect


def _is_relevant(key: Key, run: RunConfig) -> bool:
    is_relevant = _RELEVANT.get(key)
    return is_relevant is None or is_relevant(run)


def _agree(key: Key, saved: RunConfig, now: RunConfig) -> bool:
    mine, theirs = _value(saved, key), _value(now, key)
    # Runs of earlier versions left the tokenizer's own end-of-document token out.
    return mine == theirs or (key == ("data", "eod_token") and None in (mine, theirs))


def _value(run: RunConfig, key: Key) -> Any:
    """What is compared: values that mean the same are made the same."""
    section, name = key
    value = getattr(getattr(run, section), name)
    if name in ("bf16", "fp16"):
        return run.optim.precision
    if name == "matmul":  # runs of earlier versions had no other library
        return "mkl" if value == "auto" else value
    if name == "optimizer":
        return "adam" if value == "adamw" else value
    if name == "sample_order_samples":  # by default the length of the run decides
        return train_samples_asked_for(run.data, run.train)
    return _shares(value) if name == "split" else value


def _shares(split: str) -> str:
    """The shares of a split without what does not change them."""
    words = split.strip("'\" ").replace("/", ",").split(",")
    return ",".join(f"{float(word):g}" for word in words if word.strip())


def _label(key: Key) -> str:
    if key[1] in ("bf16", "fp16"):
        return "precision (--bf16, --fp16)"
    if key[1] == "sample_order_samples":
        return "--sample-order-samples (by default what --train-iters or --train-samples asks for)"
    option = BY_KEY.get(key)
    return key[1] if option is None else option.spelling


def _shown(key: Key, value: Any) -> str:
    """A value as the label means it: a flag that switches something off is on where the field is False."""
    if isinstance(value, bool):
        option = BY_KEY.get(key)
        is_negative = option is not None and option.flag.kind == "off"
        return "on" if value != is_negative else "off"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
