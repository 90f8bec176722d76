"""The keys of a DeepSpeed file, each with its fate: `deepspeed_file.py` reads files by these tables.

A dot leads into an object. Source: DeepSpeed's "Configuration JSON" page (deepspeed.ai/docs/config-json),
`deepspeed/runtime/config.py`, and for the defaults `deepspeed/ops` and `deepspeed/runtime/lr_schedules.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Key = tuple[str, str]

# Keys that set an option as they are.
DIRECT: Mapping[str, Key] = {
    "train_batch_size": ("train", "global_batch_size"),
    "train_micro_batch_size_per_gpu": ("train", "micro_batch_size"),
    "gradient_accumulation_steps": ("train", "gradient_accumulation_steps"),
    "gradient_clipping": ("optim", "clip_grad"),
    "fp16.enabled": ("optim", "fp16"),
    "fp16.loss_scale_window": ("optim", "loss_scale_window"),
    "fp16.hysteresis": ("optim", "hysteresis"),
    "fp16.min_loss_scale": ("optim", "min_loss_scale"),
    "bf16.enabled": ("optim", "bf16"),
    "bfloat16.enabled": ("optim", "bf16"),
    "zero_optimization.stage": ("parallel", "zero_stage"),
    "zero_optimization.offload_optimizer.device": ("parallel", "offload_optimizer"),
    "zero_optimization.offload_param.device": ("parallel", "offload_params"),
    "zero_optimization.offload_optimizer.nvme_path": ("parallel", "offload_dir"),
    "zero_optimization.offload_param.nvme_path": ("parallel", "offload_dir"),
    "zero_optimization.mics_shard_size": ("parallel", "zero_shard_size"),
    "optimizer.params.lr": ("optim", "lr"),
    "optimizer.params.eps": ("optim", "adam_eps"),
    "optimizer.params.weight_decay": ("optim", "weight_decay"),
    "optimizer.params.momentum": ("optim", "sgd_momentum"),
    "optimizer.params.max_grad_norm": ("optim", "clip_grad"),
    "optimizer.params.adam_w_mode": ("optim", "decoupled_weight_decay"),
    "optimizer.params.adamw_mode": ("optim", "decoupled_weight_decay"),
    "scheduler.params.warmup_max_lr": ("optim", "lr"),
    "scheduler.params.warmup_min_lr": ("optim", "lr_warmup_init"),
    "scheduler.params.warmup_num_steps": ("optim", "lr_warmup_iters"),
    "scheduler.params.total_num_steps": ("optim", "lr_decay_iters"),
    "tensorboard.output_path": ("train", "tensorboard_dir"),
    "wandb.project": ("train", "wandb_project"),
}
# Values at which a key sets nothing, because DeepSpeed takes them for "not so".
UNSET: Mapping[str, tuple[Any, ...]] = {
    "zero_optimization.mics_shard_size": (-1,),
}
_BUFFERS = "buffers and buckets are sized by the layers, and change no result"
_LOGS = "the run has its own log"
WITHOUT_EFFECT: Mapping[str, str] = {
    _BUFFERS: """
    zero_optimization.overlap_comm zero_optimization.contiguous_gradients zero_optimization.reduce_scatter
    zero_optimization.reduce_bucket_size zero_optimization.allgather_partitions zero_optimization.allgather_bucket_size
    zero_optimization.use_multi_rank_bucket_allreduce zero_optimization.round_robin_gradients
    zero_optimization.sub_group_size zero_optimization.prefetch_bucket_size
    zero_optimization.model_persistence_threshold zero_optimization.max_live_parameters
    zero_optimization.max_reuse_distance zero_optimization.gather_16bit_weights_on_model_save
    zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_param_persistence_threshold
    zero_optimization.stage3_model_persistence_threshold zero_optimization.stage3_max_live_parameters
    zero_optimization.stage3_max_reuse_distance zero_optimization.stage3_gather_16bit_weights_on_model_save
    zero_optimization.stage3_gather_fp16_weights_on_model_save zero_optimization.stage3_module_granularity_threshold
    zero_optimization.use_all_reduce_for_fetch_params zero_optimization.stage3_use_all_reduce_for_fetch_params
    zero_optimization.ignore_unused_parameters zero_optimization.legacy_stage1 zero_optimization.elastic_checkpoint
    zero_optimization.memory_efficient_linear zero_optimization.load_from_fp32_weights
    zero_optimization.override_module_apply zero_optimization.pipeline_loading_checkpoint
    zero_optimization.grad_hooks zero_optimization.log_trace_cache_warnings
    zero_optimization.mics_hierarchical_params_gather zero_optimization.param_persistence_threshold
    zero_optimization.offload_optimizer.pin_memory zero_optimization.offload_optimizer.buffer_count
    zero_optimization.offload_optimizer.pipeline_read zero_optimization.offload_optimizer.pipeline_write
    zero_optimization.offload_optimizer.pipeline zero_optimization.offload_optimizer.fast_init
    zero_optimization.offload_param.pin_memory zero_optimization.offload_param.buffer_count
    zero_optimization.offload_param.buffer_size zero_optimization.offload_param.max_in_cpu
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer prescale_gradients gradient_predivide_factor
    disable_allgather fp32_allreduce aio pipeline graph_harvesting use_data_before_expert_parallelism
    seq_parallel_communication_data_type""",
    _LOGS: """
    steps_per_print wall_clock_breakdown dump_state memory_breakdown flops_profiler comms_logger csv_monitor comet
    tensorboard.job_name wandb.team wandb.group monitor_config""",
    "checkpoints have one format, which any layout writes and loads": "checkpoint load_universal_checkpoint",
    "activations are recomputed where --recompute-granularity says so": "activation_checkpointing",
    "fp16 scales the loss as Megatron-LM does": "fp16.auto_cast fp16.consecutive_hysteresis",
    "Adam is torch's fused one": "optimizer.params.torch_adam optimizer.params.set_grad_none optimizer.params.fused",
}
# Objects of features that are not here: without effect while "enabled" is not true.
SWITCHED_OFF = """
    amp sparse_attention compression_training progressive_layer_drop eigenvalue
    elasticity autotuning torch_autocast hybrid_engine quantize_training nebula compile"""
# What to write instead of one of them that is here in another way.
INSTEAD: Mapping[str, str] = {
    "compile": "DeepSpeed compiles the whole model; leave it out, and give --compile to have blocks compiled",
}
# Keys that ask for another arithmetic, with the values at which they do not.
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "sparse_gradients": ((False,), "gradients of tables are dense"),
    "communication_data_type": (("fp32", None), "gradients travel in fp32, or in bf16 by --grad-reduce-in-bf16"),
    "data_types.grad_accum_dtype": (("fp32", None), "gradients are added up in fp32, or by --grad-reduce-in-bf16"),
    "zero_optimization.zero_quantized_weights": ((False,), "weights are gathered in the precision of the layers"),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), "all weights are trained"),
    "zero_optimization.zero_hpz_partition_size": ((1,), "weights have one copy; --zero-shard-size shards in groups"),
    "zero_optimization.zero_quantized_gradients": ((False,), "gradients are reduced unquantised"),
    "zero_optimization.offload_optimizer.ratio": ((1, 1.0), "the whole state is offloaded or none of it"),
    "bf16.immediate_grad_update": ((True, False), "gradients are added up once for each micro-batch"),
    "optimizer.params.bias_correction": ((True,), "Adam corrects the bias of its moments"),
    "optimizer.params.amsgrad": ((False,), "Adam keeps no maximum of its moments"),
    "optimizer.params.nesterov": ((False,), "use --optimizer sgd with --sgd-momentum"),
    "fp16.fp16_master_weights_and_grads": ((False,), "master weights are fp32"),
    "optimizer.legacy_fusion": ((False,), "Adam is torch's"),
    "zero_optimization.param_dtype": ((), "use --bf16 or --fp16"),
}
OPTIMIZERS = {"adam": "adam", "adamw": "adam", "lamb": "lamb", "lion": "lion", "sgd": "sgd", "muon": "muon"}
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear"}
# What a left-out key means to DeepSpeed where our default is another: by optimizer, and of fp16.
_NO_DECAY: Mapping[str, Any] = {"weight_decay": 0.0}
IMPLIED_BY_OPTIMIZER: Mapping[str, Mapping[str, Any]] = {
    "adam": _NO_DECAY,
    "lamb": _NO_DECAY,
    "lion": {**_NO_DECAY, "betas": [0.9, 0.99]},
    "sgd": {**_NO_DECAY, "momentum": 0.0},
}
IMPLIED_SCALE_POWER = 16
# Keys of a scheduler whose default changes the learning rate, with what it is.
NEEDED_OF_SCHEDULER: Mapping[str, str] = {
    "warmup_type": "log, and the learning rate warms up linearly here; write linear, or use --lr-warmup-iters instead",
    "warmup_num_steps": "1000; write it, or use --lr-warmup-iters instead",
    "warmup_max_lr": "0.001 or the optimizer's lr, by the version of DeepSpeed; write it, or use --lr instead",
}

OPTIONS_OF_DEEPSPEED: frozenset[str] = frozenset(name for _, name in DIRECT.values()) | {
    *("optimizer", "adam_beta1", "adam_beta2", "loss_scale", "initial_loss_scale", "lr_decay_style"),
    *("curriculum_metric", "curriculum_deepspeed_index", "random_ltd"),
}
