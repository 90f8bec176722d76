"""A DeepSpeed JSON file (`--deepspeed_config`): what it sets of ZeRO, batch, precision, optimizer and schedule.

Each key has one fate, as flags have: it sets an option of ours, it is without effect here (buffers, buckets, logs), or
it asks for something that is not here. Keys that DeepSpeed does not know either are mistakes. A value of "auto" leaves
the option to the flags, as in Hugging Face's integration.

Source: DeepSpeed's "Configuration JSON" page (deepspeed.ai/docs/config-json) and `deepspeed/runtime/config.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron3d.config.options import BY_KEY, Settings

Key = tuple[str, str]


@dataclass
class DeepSpeedFile:
    """What a file says.

    Attributes:
        values: option -> (value, where in the file it stands).
        problems: sentences about what cannot be read or done.
        lines: sentences about what has no effect.
        is_read: whether the file could be read at all.
    """

    values: dict[Key, tuple[Any, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    is_read: bool = True

    def contradictions(self, path: str, given: Settings) -> list[str]:
        """A sentence for each option that `given`, the flags and other files, sets to another value than the file."""
        problems = [
            f"{path} has {where} = {_shown(value)}, but {BY_KEY[key].spelling} is {_shown(given[key])}; make them "
            "equal, or leave one of them out."
            for key, (value, where) in self.values.items()
            if key in given and given[key] != value
        ]
        for mine, other in (("bf16", "fp16"), ("fp16", "bf16")):
            value, where = self.values.get(("optim", mine), (False, ""))
            if value and given.get(("optim", other)) and ("optim", mine) not in given:
                problems.append(f"{path} has {where} = true, but --{other} is given; give only one of them.")
        stage, where = self.values.get(("parallel", "zero_stage"), (1, ""))
        if given.get(("parallel", "use_distributed_optimizer")) and stage != 1:
            problems.append(
                f"{path} has {where} = {stage}, but --use-distributed-optimizer is stage 1; leave one of them out."
            )
        return problems

    def settings(self, given: Settings) -> dict[Key, Any]:
        """What the file adds to `given`; precision stays with the flags where they chose one."""
        chosen = given.get(("optim", "bf16")) or given.get(("optim", "fp16"))
        precision = (("optim", "bf16"), ("optim", "fp16")) if chosen else ()
        return {key: value for key, (value, _) in self.values.items() if key not in given and key not in precision}


def read_deepspeed_file(path: str) -> DeepSpeedFile:
    """What a DeepSpeed JSON file sets; a file that is missing or malformed is a problem of the result."""
    found = DeepSpeedFile()
    try:
        parsed = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        return _unread(f"--deepspeed_config {path} cannot be read ({error.strerror}); give the path of a JSON file.")
    except (ValueError, RecursionError) as error:
        return _unread(f"--deepspeed_config {path} is not valid JSON ({error}); correct it there.")
    if not isinstance(parsed, dict):
        return _unread(f"--deepspeed_config {path} holds a {type(parsed).__name__}; it must be one object.")
    reader = _Reader(path, found)
    for name, value in parsed.items():
        reader.read(name, value)
    _check_warmup_type(path, parsed, found)
    return found


def _check_warmup_type(path: str, parsed: Mapping[str, Any], found: DeepSpeedFile) -> None:
    scheduler = parsed.get("scheduler")
    if not isinstance(scheduler, dict) or scheduler.get("type") not in _SCHEDULES:
        return
    params = scheduler.get("params")
    if not isinstance(params, dict) or "warmup_type" not in params:
        found.problems.append(
            f"{path} leaves scheduler.params.warmup_type out, which means log, and the learning rate warms up linearly "
            "here; write linear, or use --lr-warmup-iters instead."
        )


def _unread(problem: str) -> DeepSpeedFile:
    return DeepSpeedFile(problems=[problem], is_read=False)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


# Keys that set an option as they are; a dot leads into an object.
_DIRECT: Mapping[str, Key] = {
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
    "scheduler.params.warmup_max_lr": ("optim", "lr"),
    "scheduler.params.warmup_min_lr": ("optim", "lr_warmup_init"),
    "scheduler.params.warmup_num_steps": ("optim", "lr_warmup_iters"),
    "scheduler.params.total_num_steps": ("optim", "lr_decay_iters"),
    "tensorboard.output_path": ("train", "tensorboard_dir"),
    "wandb.project": ("train", "wandb_project"),
}
# Values at which a key sets nothing, because DeepSpeed takes them for "not so".
_UNSET: Mapping[str, tuple[Any, ...]] = {
    "zero_optimization.mics_shard_size": (-1,),
}
_BUFFERS = "buffers and buckets are sized by the layers, and change no result"
_LOGS = "the run has its own log, and change no result"
_WITHOUT_EFFECT: Mapping[str, str] = {
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
    tensorboard.enabled tensorboard.job_name wandb.enabled wandb.team wandb.group monitor_config""",
    "checkpoints have one format, which any layout writes and loads": "checkpoint load_universal_checkpoint",
    "activations are recomputed where --recompute-granularity says so": "activation_checkpointing",
    "fp16 scales the loss as Megatron-LM does": "fp16.auto_cast fp16.consecutive_hysteresis",
    "Adam is torch's fused one": "optimizer.params.torch_adam optimizer.params.bias_correction "
    "optimizer.params.set_grad_none optimizer.params.fused optimizer.params.adamw_mode",
}
# Objects of features that are not here: without effect while "enabled" is not true.
_SWITCHED_OFF = """
    amp sparse_attention curriculum_learning data_efficiency compression_training progressive_layer_drop eigenvalue
    elasticity autotuning torch_autocast hybrid_engine quantize_training nebula compile"""
# Keys that ask for another arithmetic, with the values at which they do not.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "sparse_gradients": ((False,), "gradients of tables are dense"),
    "communication_data_type": (("fp32", None), "gradients travel in fp32, or in bf16 by --grad-reduce-in-bf16"),
    "data_types.grad_accum_dtype": (("fp32", None), "gradients are added up in fp32, or by --grad-reduce-in-bf16"),
    "zero_optimization.zero_quantized_weights": ((False,), "weights are gathered in the precision of the layers"),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), "all weights are trained"),
    "zero_optimization.zero_hpz_partition_size": ((1,), "weights have one copy; --zero-shard-size shards in groups"),
    "zero_optimization.zero_quantized_gradients": ((False,), "gradients are reduced unquantised"),
    "zero_optimization.offload_optimizer.ratio": ((1, 1.0), "the whole state is offloaded or none of it"),
    "bf16.immediate_grad_update": ((True, False), "gradients are added up once for each micro-batch"),
    "optimizer.params.amsgrad": ((False,), "Adam keeps no maximum of its moments"),
    "optimizer.params.nesterov": ((False,), "use --optimizer sgd with --sgd-momentum"),
    "fp16.fp16_master_weights_and_grads": ((False,), "master weights are fp32"),
    "optimizer.legacy_fusion": ((False,), "Adam is torch's"),
    "zero_optimization.param_dtype": ((), "use --bf16 or --fp16"),
}
_OPTIMIZERS = {"adam": "adam", "adamw": "adam", "lamb": "lamb", "lion": "lion", "sgd": "sgd", "muon": "muon"}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear"}

OPTIONS_OF_DEEPSPEED: frozenset[str] = frozenset(name for _, name in _DIRECT.values()) | {
    *("optimizer", "adam_beta1", "adam_beta2", "loss_scale", "initial_loss_scale", "lr_decay_style"),
}


class _Reader:
    """Reads one file key by key, objects depth first, and writes what it finds into a `DeepSpeedFile`."""

    def __init__(self, path: str, found: DeepSpeedFile) -> None:
        self._path = path
        self._found = found
        self._special: Mapping[str, Callable[[str, Any], None]] = {
            "optimizer.type": self._optimizer,
            "scheduler.type": self._scheduler,
            "optimizer.params.betas": self._betas,
            "fp16.loss_scale": self._loss_scale,
            "fp16.initial_scale_power": self._initial_scale,
            "zero_optimization.cpu_offload": self._cpu_offload,
            "zero_optimization.cpu_offload_params": self._cpu_offload,
            "scheduler.params.warmup_type": self._warmup_type,
        }

    def read(self, name: str, value: Any) -> None:
        """Judge the key `name`, the path of an entry with dots."""
        if value == "auto" or (name in _UNSET and value in _UNSET[name]):
            return
        if name in self._special:
            self._special[name](name, value)
        elif name in _DIRECT:
            self._set(name, _DIRECT[name], value)
        elif name in _REFUSED:
            harmless, reason = _REFUSED[name]
            if value not in harmless:
                self._refuse(name, value, f"{reason}; leave it out")
        elif (reason := _reason_without_effect(name)) is not None:
            self._found.lines.append(f"{self._path}: {name} is accepted without effect: {reason}.")
        elif name in _SWITCHED_OFF.split():
            if isinstance(value, dict) and value.get("enabled"):
                self._refuse(name, "enabled", "this is not in this version; leave it out")
        elif isinstance(value, dict) and _is_object(name):
            for key, inner in _in_use(name, value).items():
                self.read(f"{name}.{key}", inner)
        else:
            self._found.problems.append(f"{self._path} has the key {name}, which is not known; correct or remove it.")

    def _set(self, name: str, key: Key, value: Any) -> None:
        option = BY_KEY[key]
        where = name if name == option.name else f"{name} ({option.spelling})"
        try:
            converted = option.convert(value)
        except ValueError as error:
            self._found.problems.append(f"{self._path}: {name}: {error}")
            return
        earlier = self._found.values.get(key)
        if earlier is not None and earlier[0] != converted:
            self._found.problems.append(
                f"{self._path} sets {option.spelling} twice: {earlier[1]} = {_shown(earlier[0])} and {name} = "
                f"{_shown(converted)}; make them equal."
            )
        self._found.values[key] = (converted, where)

    def _refuse(self, name: str, value: Any, instead: str) -> None:
        self._found.problems.append(f"{self._path} has {name} = {_shown(value)}, which is not supported: {instead}.")

    def _optimizer(self, name: str, value: Any) -> None:
        kind = str(value).lower()
        if kind not in _OPTIMIZERS:
            self._refuse(name, value, f"use one of {', '.join(sorted(_OPTIMIZERS))}")
            return
        self._set(name, ("optim", "optimizer"), _OPTIMIZERS[kind])

    def _scheduler(self, name: str, value: Any) -> None:
        if value not in _SCHEDULES:
            self._refuse(name, value, f"use {' or '.join(_SCHEDULES)}, or --lr-decay-style and its flags")
            return
        self._set(name, ("optim", "lr_decay_style"), _SCHEDULES[value])

    def _warmup_type(self, name: str, value: Any) -> None:
        if value != "linear":
            self._refuse(name, value, "the learning rate warms up linearly; write linear")

    def _betas(self, name: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) != 2:
            self._found.problems.append(f"{self._path}: {name} is {value}; write two numbers, such as [0.9, 0.95].")
            return
        for field_name, beta in zip(("adam_beta1", "adam_beta2"), value, strict=True):
            self._set(name, ("optim", field_name), beta)

    def _loss_scale(self, name: str, value: Any) -> None:
        if value:  # 0 is a dynamic scale, our default
            self._set(name, ("optim", "loss_scale"), value)

    def _initial_scale(self, name: str, value: Any) -> None:
        if not isinstance(value, int) or not 0 <= value <= 64:
            self._found.problems.append(f"{self._path}: {name} is {value}; write an exponent of 2 from 0 to 64.")
            return
        self._set(name, ("optim", "initial_loss_scale"), 2.0**value)

    def _cpu_offload(self, name: str, value: Any) -> None:
        if value:
            field_name = "offload_optimizer" if name.endswith("cpu_offload") else "offload_params"
            self._set(name, ("parallel", field_name), "cpu")


def _in_use(name: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of an object that count: of one that is switched off only the switch."""
    if name in ("fp16", "bf16", "bfloat16", "tensorboard", "wandb") and not value.get("enabled"):
        return {"enabled": value["enabled"]} if "enabled" in value else {}
    if name.startswith("zero_optimization.offload_") and value.get("device") != "nvme":
        return {key: inner for key, inner in value.items() if key != "nvme_path"}
    return value


def _reason_without_effect(name: str) -> str | None:
    return next((reason for reason, names in _WITHOUT_EFFECT.items() if name in names.split()), None)


def _is_object(name: str) -> bool:
    """Whether some known key lies inside `name`."""
    known = (*_DIRECT, *_REFUSED, *(key for names in _WITHOUT_EFFECT.values() for key in names.split()))
    return any(key.startswith(f"{name}.") for key in known)
