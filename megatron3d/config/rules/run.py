"""What must hold between the options of training, the optimizer, the data and the checkpoints.

Each rule takes the sections it needs and yields sentences. A section named `given` is as the user gave it (values
outside their own range set back to the default); one named by what it is has the derived values too, where it matters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from megatron3d.config.batch_size import batch_size_at, parse_step_schedule
from megatron3d.config.derive import model_parallel_size
from megatron3d.config.options import BY_NAME
from megatron3d.config.rules.attention import attention_backend_rule
from megatron3d.config.rules.blend import blend_rule
from megatron3d.config.rules.curriculum import curriculum_rule
from megatron3d.config.rules.fim import fim_rule
from megatron3d.config.rules.fp8 import fp8_problems
from megatron3d.config.rules.kernels import compile_rule
from megatron3d.config.rules.lengths import lengths_rule, token_rates_rule
from megatron3d.config.rules.long_sequences import mlp_chunks_rule
from megatron3d.config.rules.optimizer import decoupling_rule, implementation_rule, moments_rule
from megatron3d.config.rules.random_ltd import random_ltd_problems
from megatron3d.config.rules.sample_order import sample_order_rule
from megatron3d.config.rules.tokenizer import tokenizer_rule
from megatron3d.config.rules.tokens import accumulation_rule, tokens_rule
from megatron3d.config.run import DraftRun, GivenRun
from megatron3d.config.sections.checkpoint import CheckpointConfig
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.optim import GivenOptim
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.sections.train import DraftTrain, GivenTrain
from megatron3d.errors import ConfigError

_REQUIRED = "num_layers hidden_size num_attention_heads seq_length micro_batch_size lr"


def required_problems(config: GivenRun) -> Iterator[str]:
    """Options without which there is no run."""
    for name in _REQUIRED.split():
        option = BY_NAME[name]
        if option.value_in(config) is None:
            preset = " or a --preset" if option.section == "model" else ""
            yield f"{option.spelling} is missing ({option.flag.help.rstrip('.')}); give it{preset}."
    train = config.train
    if train.train_iters is None and train.train_samples is None and train.train_tokens is None:
        yield "--train-iters is missing, and so is --train-samples: the run has no length; give one of them."


def run_problems(given: GivenRun, run: DraftRun) -> Iterator[str]:
    """What does not go together in the training of a model."""
    train, optim, seq_length = given.train, given.optim, given.model.seq_length
    yield from length_rule(train, optim)
    yield from steps_rule(run.train, run.parallel.data_parallel_size)
    yield from batch_rule(train, run.parallel, seq_length)
    yield from learning_rate_rule(run.optim, by_samples=run.train.train_samples is not None)
    yield from weight_decay_rule(optim)
    yield from precision_rule(optim)
    yield from fp8_problems(train, run.model, run.parallel, optim)
    yield from decoupling_rule(optim)
    yield from moments_rule(optim)
    yield from implementation_rule(optim, run.parallel.device)
    yield from recompute_rule(train, run.train)
    yield from mlp_chunks_rule(run.model, run.train)
    yield from random_ltd_problems(train, given.model, run.parallel)
    yield from matmul_rule(train, optim, run.parallel.device)
    yield from fp32_precision_rule(train, run.parallel.device)
    yield from packed_attention_rule(train, optim, run.data, run.parallel.device)
    yield from compile_rule(train, given.lengths)
    yield from attention_backend_rule(train, run.data, run.parallel)
    yield from data_rule(run.data)
    yield from curriculum_rule(given.curriculum, run.curriculum, run.data)
    yield from sample_order_rule(run.data, run.model)
    yield from blend_rule(run.data)
    yield from fim_rule(run.data, run.model)
    yield from tokenizer_rule(given.data, run.data, given.model.vocab_size)
    yield from checkpoint_rule(given.checkpoint)
    yield from tokens_rule(train, optim, seq_length)
    yield from accumulation_rule(train, run.parallel)
    yield from lengths_rule(given.lengths, given.model, train, run.parallel)
    yield from token_rates_rule(optim, run.optim, run.train)
    yield from profile_rule(train, run.parallel.world_size)


def length_rule(train: GivenTrain, optim: GivenOptim) -> Iterator[str]:
    """Iterations and samples exclude each other, in the length of the run and of its schedules."""
    if train.train_iters is not None and train.train_samples is not None:
        yield (
            f"--train-iters {train.train_iters} and --train-samples {train.train_samples} both set the length of the "
            "run; give only one of them."
        )
        return
    if train.train_iters is not None and train.train_tokens is not None:
        yield (
            f"--train-iters {train.train_iters} and --train-tokens {train.train_tokens} both set the length of the "
            "run; give only one of them."
        )
        return
    by_samples = train.train_samples is not None or train.train_tokens is not None
    if train.train_iters is None and not by_samples:
        return
    mine, other = ("samples", "iters") if by_samples else ("iters", "samples")
    given_by = "tokens" if by_samples and train.train_samples is None else mine
    for kind in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        option = BY_NAME[f"{kind}_{other}"]
        value = vars(optim)[option.name]
        if value:
            yield (
                f"{option.spelling} {value} counts {'iterations' if other == 'iters' else other}, but the run is given "
                f"by --train-{given_by}; use --{kind.replace('_', '-')}-{mine}, or --train-{other}."
            )


def steps_rule(train: DraftTrain, data_parallel_size: int) -> Iterator[str]:
    """The run can make a step, and what it is to skip are iterations."""
    if train.train_samples is not None and train.train_iters is None and train.global_batch_size:
        try:
            first = batch_size_at(train, 0, data_parallel_size)
        except (ValueError, ZeroDivisionError):
            first = 0  # a malformed ramp, which has its own sentence
        if train.train_samples < first:
            yield (
                f"--train-samples {train.train_samples} is less than the first global batch of {first}, so the run "
                f"could make no step; use --train-samples {first} or more, or a smaller --global-batch-size."
            )
    wrong = [word for word in train.iterations_to_skip if not word.isdecimal()]
    if wrong:
        yield (
            f"--iterations-to-skip {' '.join(train.iterations_to_skip)} has {wrong[0]}, which is no iteration; list "
            "whole numbers, such as 0 for the first step."
        )


def profile_rule(train: GivenTrain, world_size: int) -> Iterator[str]:
    """What --profile is to record exists."""
    if not train.profile:
        return
    if train.profile_step_end <= train.profile_step_start:
        yield (
            f"--profile-step-end {train.profile_step_end} is not after --profile-step-start "
            f"{train.profile_step_start}, so nothing would be recorded; use {train.profile_step_start + 1} or more."
        )
    wrong = [word for word in train.profile_ranks if not word.isdecimal() or int(word) >= world_size]
    if wrong:
        yield (
            f"--profile-ranks {' '.join(train.profile_ranks)} has {wrong[0]}, which is no rank of this run; list "
            f"whole numbers below {world_size}."
        )


def learning_rate_rule(optim: GivenOptim, *, by_samples: bool) -> Iterator[str]:
    """The learning rate rises and falls within its bounds and its length."""
    if optim.lr is not None and optim.min_lr > optim.lr:
        yield (
            f"--min-lr {optim.min_lr:g} is above --lr {optim.lr:g}, from which the rate decays; use --min-lr up to "
            f"{optim.lr:g}."
        )
    if optim.lr is not None and optim.lr_warmup_init > optim.lr:
        yield (
            f"--lr-warmup-init {optim.lr_warmup_init:g} is above --lr {optim.lr:g}, to which it rises; use a value "
            f"up to {optim.lr:g}."
        )
    unit = "samples" if by_samples else "iters"
    warmup = optim.lr_warmup_samples if unit == "samples" else optim.lr_warmup_iters
    decay = optim.lr_decay_samples if unit == "samples" else optim.lr_decay_iters
    if warmup and optim.lr_warmup_fraction is not None:
        yield (
            f"--lr-warmup-fraction {optim.lr_warmup_fraction:g} and --lr-warmup-{unit} {warmup} both set the warm-up; "
            "give only one of them."
        )
    elif decay and warmup >= decay:
        yield (
            f"--lr-warmup-{unit} {warmup} is not shorter than the decay of {decay} {unit} (--lr-decay-{unit} or "
            f"--train-{unit}); use a warm-up under {decay}, or a longer decay."
        )
    yield from _wsd_problems(optim, unit, decay)


def _wsd_problems(optim: GivenOptim, unit: str, decay: int | None) -> Iterator[str]:
    last_phase = optim.lr_wsd_decay_samples if unit == "samples" else optim.lr_wsd_decay_iters
    if optim.lr_decay_style == "WSD" and last_phase is None:
        tenth = f", such as {max(1, decay // 10)}" if decay else ""
        yield f"--lr-decay-style WSD needs the length of its last phase; give --lr-wsd-decay-{unit}{tenth}."
    if optim.lr_decay_style == "WSD" and last_phase and decay and last_phase > decay:
        yield (
            f"--lr-wsd-decay-{unit} {last_phase} is longer than the whole decay of {decay} {unit}; use at most {decay}."
        )


def weight_decay_rule(optim: GivenOptim) -> Iterator[str]:
    """A weight-decay schedule has both ends and rises; a constant decay has none."""
    start, end = optim.start_weight_decay, optim.end_weight_decay
    if optim.weight_decay_incr_style == "constant" and (start is not None or end is not None):
        yield (
            f"--start-weight-decay {start} and --end-weight-decay {end} mean nothing while --weight-decay-incr-style "
            "is constant; make it linear or cosine, or give --weight-decay alone."
        )
    elif optim.weight_decay_incr_style != "constant" and (start is None or end is None):
        yield (
            f"--weight-decay-incr-style {optim.weight_decay_incr_style} needs --start-weight-decay (given: {start}) "
            f"and --end-weight-decay (given: {end}); give both."
        )
    elif start is not None and end is not None and start > end:
        yield f"--start-weight-decay {start:g} is above --end-weight-decay {end:g}; the decay rises, so swap them."


def precision_rule(optim: GivenOptim) -> Iterator[str]:
    """One compute precision, and a loss scale that can move."""
    if optim.bf16 and optim.fp16:
        yield "--bf16 and --fp16 are both given, but the layers compute in one precision; give only one of them."
    if optim.min_loss_scale > optim.initial_loss_scale:
        yield (
            f"--min-loss-scale {optim.min_loss_scale:g} is above --initial-loss-scale {optim.initial_loss_scale:g}; "
            "lower the one or raise the other."
        )


def batch_rule(train: GivenTrain, parallel: ParallelConfig, seq_length: int | None) -> Iterator[str]:
    """Every global batch splits into whole microbatches on every data-parallel rank."""
    micro = train.micro_batch_size
    if not micro:
        return
    # Ranks that do not factor have no data-parallel size; a multiple of the micro-batch is needed at any.
    factors = parallel.world_size % model_parallel_size(parallel) == 0
    dp = parallel.data_parallel_size if factors else 1
    batch = train.global_batch_size
    if batch and batch % (micro * dp):
        yield _batch_sentence(batch, micro, dp, f" x data-parallel {dp} = {micro * dp}" if factors else "")
    yield from _ramp_problems(train, seq_length, micro * dp, batch or micro * dp)


def _batch_sentence(batch: int, micro: int, dp: int, product: str) -> str:
    """The sentence about an indivisible batch, with the nearest sizes that work."""
    at_once = micro * dp
    below, above = batch // at_once * at_once, -(-batch // at_once) * at_once
    sizes = f"{below} or {above}" if below else str(above)
    micros = [size for size in range(1, batch // dp + 1) if batch % (size * dp) == 0]
    nearest = [*[m for m in micros if m < micro][-1:], *[m for m in micros if m > micro][:1]]
    other = f", or --micro-batch-size {' or '.join(str(m) for m in nearest)}" if nearest else ""
    return f"--global-batch-size {batch} is not a multiple of micro-batch {micro}{product}; use {sizes}{other}."


def _ramp_problems(train: GivenTrain, seq_length: int | None, at_once: int, batch: int) -> Iterator[str]:
    """A ramp of batch sizes, by either option, takes only sizes that split."""
    if train.rampup_batch_size and train.step_batch_size_schedule:
        yield (
            f"--rampup-batch-size {' '.join(train.rampup_batch_size)} and --step-batch-size-schedule "
            f"'{train.step_batch_size_schedule}' both set how the batch grows; give only one of them."
        )
    if train.rampup_batch_size:
        yield from _rampup_problems(train.rampup_batch_size, at_once, batch)
    if train.step_batch_size_schedule and seq_length:
        try:
            levels = parse_step_schedule(train.step_batch_size_schedule, seq_length)
        except ConfigError as error:
            yield str(error)
            return
        for _, size in levels:
            if size % at_once:
                yield (
                    f"--step-batch-size-schedule has the size {size}, which is not a multiple of micro-batch x "
                    f"data-parallel = {at_once}; use {max(1, size // at_once) * at_once}."
                )
        if train.global_batch_size not in (None, levels[-1][1]):
            yield (
                f"--global-batch-size {train.global_batch_size} is not the last size {levels[-1][1]} of "
                "--step-batch-size-schedule; make them equal, or give only the schedule."
            )


def _rampup_problems(words: tuple[str, ...], at_once: int, batch: int) -> Iterator[str]:
    text = f"--rampup-batch-size {' '.join(words)}"
    if len(words) != 3 or not all(word.isdecimal() for word in words):
        yield f"{text} is not three whole numbers; write START INCREMENT SAMPLES, such as 16 16 300000."
        return
    start, increment, _ = (int(word) for word in words)
    for name, size in (("starts at", start), ("rises by", increment)):
        if size < 1 or size % at_once:
            yield (
                f"{text} {name} {size}, which is not a multiple of micro-batch x data-parallel = {at_once}; use "
                f"{max(1, size // at_once) * at_once}."
            )
    if start > batch:
        yield f"{text} starts above --global-batch-size {batch}; start at most there, or raise the global batch."
    elif increment >= 1 and (batch - start) % increment:
        nearest = start + round((batch - start) / increment) * increment
        yield (
            f"{text} does not reach --global-batch-size {batch} in whole increments: {batch} - {start} is not a "
            f"multiple of {increment}; use --global-batch-size {nearest}, or an increment that divides {batch - start}."
        )


def recompute_rule(given: GivenTrain, train: GivenTrain) -> Iterator[str]:
    """Method and number of layers belong to full recomputation."""
    granularity = train.recompute_granularity
    if given.recompute_activations and given.recompute_granularity == "full":
        yield (
            "--recompute-activations asks for selective recomputation, but --recompute-granularity is full; give only "
            "one of them."
        )
    if given.recompute_method is not None and granularity == "selective":
        yield (
            f"--recompute-method {given.recompute_method} needs --recompute-granularity full, not selective; change "
            "one or drop it."
        )
    if given.recompute_num_layers is not None and granularity != "full":
        yield (
            f"--recompute-num-layers {given.recompute_num_layers} has no meaning without --recompute-granularity full; "
            "give that, or drop it."
        )
    if train.recompute_reuse_communication and granularity != "full":
        yield (
            "--recompute-reuse-communication is about layers that are recomputed, and none are without "
            "--recompute-granularity full; give that, or drop it."
        )
    if train.recompute_method == "block" and granularity == "full" and given.recompute_num_layers is None:
        yield "--recompute-method block needs --recompute-num-layers, the layers of each stage to recompute; give it."


def matmul_rule(train: GivenTrain, optim: GivenOptim, device: str | None) -> Iterator[str]:
    """oneDNN is there for products of fp32 matrices on a CPU."""
    if train.matmul != "onednn":
        return
    if optim.precision != "fp32":
        yield f"--matmul onednn is for products in fp32, not --{optim.precision}; drop one of them."
    if device == "cuda":
        yield "--matmul onednn is for products on a CPU, and --device is cuda; drop it, or use --device cpu."


def fp32_precision_rule(train: GivenTrain, device: str | None) -> Iterator[str]:
    """A CPU multiplies matrices in fp32 as they are."""
    if train.fp32_matmul_precision != "highest" and device == "cpu":
        yield (
            f"--fp32-matmul-precision {train.fp32_matmul_precision} is for GPUs, and --device is cpu, where matrices "
            "in fp32 are multiplied in fp32; drop it."
        )


def packed_attention_rule(train: GivenTrain, optim: GivenOptim, data: DataConfig, device: str | None) -> Iterator[str]:
    """flash-attn is there for packed documents in 16 bits on CUDA devices, where it is installed."""
    if train.packed_attention != "flash-attn":
        return
    if not data.reset_attention_mask:
        yield "--packed-attention flash-attn is for documents that --reset-attention-mask separates; give both or none."
    if optim.precision == "fp32":
        yield "--packed-attention flash-attn computes in 16 bits; give --bf16 or --fp16, or drop it."
    if device == "cpu":
        yield "--packed-attention flash-attn is for CUDA devices, and --device is cpu; drop it."
    if find_spec("flash_attn") is None:
        yield "--packed-attention flash-attn needs the package flash-attn, which is not installed; install or drop it."


def data_rule(data: DataConfig) -> Iterator[str]:
    """There is exactly one source of training tokens, and a split with something to train on."""
    sources = {
        "--data-path": data.data_path,
        "--train-data-path, --valid-data-path or --test-data-path": data.train_data_path
        or data.valid_data_path
        or data.test_data_path,
        "--data-args-path": data.data_args_path,
        "--mock-data": data.mock_data,
    }
    named = [option for option, value in sources.items() if value]
    if not named:
        yield "No data is given; use --data-path PREFIX (of tools/preprocess_data.py), or --mock-data to try a run."
    elif len(named) > 1:
        yield f"{' and '.join(named)} are different sources of data; give only one of them."
    elif "--train" in named[0] and not data.train_data_path:
        yield "--valid-data-path or --test-data-path is given without --train-data-path; give the training data too."
    yield from _split_problems(data.split)


def _split_problems(split: str) -> Iterator[str]:
    try:
        shares = [float(word) for word in split.replace("/", ",").split(",") if word.strip()]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or any(not 0 <= share < float("inf") for share in shares):
        yield f"--split {split} is not one to three shares from 0 up; write them like 969,30,1."
    elif shares[0] == 0:
        yield f"--split {split} leaves nothing to train on; give training, the first share, more than 0."


def checkpoint_rule(checkpoint: CheckpointConfig) -> Iterator[str]:
    """What is saved has a place, and what is loaded has one too."""
    if checkpoint.save is None:
        for name in ("keep_last", "save_retain_interval"):
            option, value = BY_NAME[name].spelling, vars(checkpoint)[name]
            if value is not None:
                yield f"{option} {value} needs --save, the directory of checkpoints; give it, or drop {option}."
    retain, interval = checkpoint.save_retain_interval, checkpoint.save_interval
    if retain is not None and (interval is None or retain % interval):
        yield (
            f"--save-retain-interval {retain} keeps checkpoints of its multiples, and with --save-interval {interval} "
            "not all of these are written; make it a multiple of --save-interval."
        )
    if checkpoint.saves_asynchronously and sys.platform != "linux":
        yield f"--async-save shares memory in a way that Linux has and {sys.platform} has not; leave it out."
    if checkpoint.load is None and checkpoint.save is None and checkpoint.ckpt_step is not None:
        yield f"--ckpt-step {checkpoint.ckpt_step} needs --load, the directory it is in; give it."
    if checkpoint.finetune and checkpoint.load is None and checkpoint.pretrained_checkpoint is None:
        yield "--finetune takes the weights of a checkpoint, but there is no --load; give it, or drop --finetune."
    load, save = checkpoint.load, checkpoint.save
    if checkpoint.finetune and load and save and os.path.realpath(save) in _directories_of(load):
        yield (
            f"--finetune with --load {load} and --save {save}: when the run is started again, it could not tell "
            "whether a checkpoint there is to be fine-tuned or resumed; give another --save."
        )
    if checkpoint.exit_on_missing_checkpoint and checkpoint.load is None and checkpoint.save is None:
        yield "--exit-on-missing-checkpoint needs --load (or --save), where a checkpoint must be; give it, or drop it."
    if checkpoint.use_checkpoint_args and not (checkpoint.load or checkpoint.save or checkpoint.pretrained_checkpoint):
        yield "--use-checkpoint-args needs --load, the directory of the checkpoint; give it, or drop the option."
    if checkpoint.override_opt_param_scheduler and checkpoint.use_checkpoint_opt_param_scheduler:
        yield (
            "--override-opt-param-scheduler takes the schedule from the flags and --use-checkpoint-opt_param-scheduler "
            "from the checkpoint; give only one of them."
        )


def _directories_of(load: str) -> tuple[str, str]:
    """What --load may name: a directory of checkpoints, or one of them in such a directory."""
    return os.path.realpath(load), os.path.dirname(os.path.realpath(load))
