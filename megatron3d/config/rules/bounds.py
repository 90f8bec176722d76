"""The range of each single option, as a table; what must hold between options is in `rules/`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron3d.config.options import BY_NAME, OPTIONS, SECTIONS, Option
from megatron3d.config.run import GivenRun


@dataclass(frozen=True)
class Bound:
    """A range that several options share; None leaves that side open."""

    names: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def violation(self, value: float) -> str | None:
        """What the value must be, if it is not."""
        wrong = (
            (self.at_least is not None and value < self.at_least)
            or (self.above is not None and value <= self.above)
            or (self.at_most is not None and value > self.at_most)
            or (self.below is not None and value >= self.below)
        )
        return self.text if wrong else None

    @property
    def text(self) -> str:
        """The range in words."""
        sides = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return " and ".join(f"{word} {limit:g}" for word, limit in sides if limit is not None)


BOUNDS: tuple[Bound, ...] = (
    Bound(
        "num_layers hidden_size num_attention_heads seq_length max_position_embeddings ffn_hidden_size kv_channels "
        "num_query_groups vocab_size make_vocab_size_divisible_by tensor_model_parallel_size "
        "pipeline_model_parallel_size context_parallel_size expert_model_parallel_size expert_tensor_parallel_size "
        "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers num_layers_per_virtual_pipeline_stage "
        "num_virtual_stages_per_pipeline_rank microbatch_group_size_per_virtual_pipeline_stage "
        "tiktoken_num_special_tokens micro_batch_size global_batch_size gradient_accumulation_steps train_tokens "
        "lr_decay_tokens "
        "train_iters train_samples eval_interval exit_interval log_interval recompute_num_layers save_interval "
        "loss_chunk_size mlp_chunks_for_training "
        "profile_pipeline_step keep_last save_retain_interval check_weight_hash_across_dp_replicas_interval "
        "profile_step_end "
        "curriculum_warmup_steps lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples "
        "loss_scale_window hysteresis muon_num_ns_steps zero_shard_size muon_num_ns_steps mask_max_ngram "
        "moe_ffn_hidden_size moe_router_topk moe_router_num_groups moe_router_group_topk "
        "moe_shared_expert_intermediate_size num_experts "
        "random_ltd_min random_ltd_max random_ltd_steps random_ltd_step_size sample_order_samples "
        "rotary_scaling_factor rotary_seq_len_interpolation_factor rotary_original_max_position_embeddings",
        at_least=1,
    ),
    Bound("tp_comm_overlap_chunks", at_least=2),
    Bound(
        "seq_length_curriculum_min_difficulty seq_length_curriculum_max_difficulty seq_length_curriculum_steps "
        "seq_length_curriculum_difficulty_step seq_length_curriculum_root_degree",
        at_least=1,
    ),
    Bound(
        "lr min_lr lr_warmup_init lr_warmup_iters lr_warmup_samples lr_warmup_tokens weight_decay start_weight_decay "
        "end_weight_decay clip_grad eval_iters ckpt_step seed num_workers eod_token num_token_types init_method_std "
        "curriculum_seed zero_prefetch_units profile_step_start moe_z_loss_coeff moe_min_capacity "
        "sample_order_consumed mid_level_dataset_surplus mscale mscale_all_dim num_layers_at_start_in_bf16 "
        "num_layers_at_end_in_bf16",
        at_least=0,
    ),
    Bound(
        "norm_epsilon rotary_base adam_eps loss_scale initial_loss_scale min_loss_scale peak_tflops "
        "muon_extra_scale_factor pipeline_memory_limit_gb exit_duration_in_mins "
        "moe_router_topk_scaling_factor moe_router_bias_update_rate moe_expert_capacity_factor "
        "rotary_low_freq_factor rotary_high_freq_factor rotary_attention_factor yarn_beta_fast yarn_beta_slow",
        above=0,
    ),
    Bound(
        "hidden_dropout attention_dropout adam_beta1 adam_beta2 sgd_momentum lion_beta1 lion_beta2 muon_momentum "
        "lr_warmup_fraction moe_input_jitter_eps",
        at_least=0,
        below=1,
    ),
    Bound("rotary_percent curriculum_warmup_fraction", above=0, at_most=1),
    Bound("mask_prob", above=0, below=1),
    # A year; gloo ends the process at 16,000 of them.
    Bound("distributed_timeout_minutes", above=0, at_most=525_600),
    Bound("short_seq_prob fim_rate fim_spm_rate fim_fragment_rate", at_least=0, at_most=1),
)


def single_option_problems(config: GivenRun) -> Iterator[str]:
    """Sentences about values outside their own range or choices."""
    for option, allowed in _violations(config):
        yield (
            f"{option.spelling} {option.value_in(config)} is outside its range ({option.flag.help.rstrip('.')}); "
            f"it must be {allowed}."
        )


def wrong_options(config: GivenRun) -> frozenset[str]:
    """The names of the options whose values are outside their own range or choices."""
    return frozenset(option.name for option, _ in _violations(config))


def with_defaults_where_wrong(config: GivenRun) -> GivenRun:
    """The run with each value outside its range or choices set back, so that the other rules can go on."""
    changes: dict[str, dict[str, object]] = {section: {} for section in SECTIONS}
    for option, _ in _violations(config):
        changes[option.section][option.name] = option.default
    return GivenRun(**{section: replace(getattr(config, section), **changed) for section, changed in changes.items()})


def _violations(config: GivenRun) -> Iterator[tuple[Option, str]]:
    """Each option whose own value is impossible, with what it must be."""
    for bound in BOUNDS:
        for name in bound.names.split():
            option = BY_NAME[name]
            value = option.value_in(config)
            violation = None if value is None else bound.violation(value)
            if violation is not None:
                yield option, violation
    for option in OPTIONS:
        value = option.value_in(config)
        if value is not None and not option.allows(value):
            yield option, f"one of {', '.join(str(choice) for choice in option.flag.choices)}"
