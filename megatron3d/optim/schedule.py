"""The learning rate and the weight decay as pure functions of progress; no scheduler object, no hidden step counter.

A schedule is a handful of numbers, `ScheduleSettings`. A checkpoint stores them as JSON, and a resume compares them
with the flags (`reconcile`). Progress is counted in samples, as Megatron-LM does: with iteration-based options that is
iterations x global batch, with sample-based options the consumed samples. Where samples begin short
(`config/lengths.py`) and `--lr-decay-tokens` or `--lr-warmup-tokens` is given, progress is the consumed tokens, as
Megatron-DeepSpeed does, with the same formulas; its warm-up in samples before a decay in tokens is not here. A run that
began so and is resumed without short samples keeps counting tokens (`settings_like`).

**Which progress a step uses.** The step that makes update number k (from 0) takes the rate at the progress *before*
it: k updates made, the samples of those updates consumed. So the very first step runs at `--lr-warmup-init` (0 unless
given), and the peak is used first by step number `--lr-warmup-iters`. Megatron-LM trains with these same rates but
logs, beside each loss, the rate of the step that follows; we log the one that was used.

**Skipped steps.** Where fp16 skips an update, Megatron-LM does not advance its schedule; pass the counts of the updates
that were made, not of the attempts, to do the same.

Source: semantics of Megatron-LM's OptimizerParamScheduler, and of Megatron-DeepSpeed's for tokens
(`megatron/optimizer_param_scheduler.py`, `get_lr`: `num_tokens` in place of `num_steps`); WSD (warm-up, stable, decay)
after Hu et al. 2024, "MiniCPM", arXiv 2404.06395, section 4; minus_sqrt after Haegele et al. 2024, arXiv 2405.18392.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron3d.config.lengths import counts_in_tokens
from megatron3d.config.sections.optim import OptimConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class ScheduleSettings:
    """All numbers the two schedules need. Lengths are in `unit` ("iterations", "samples" or "tokens").

    `samples_per_unit` is the global batch size where the unit is iterations, else 1. `warmup` may be fractional, as a
    fraction of the decay length need not be whole. `wsd_decay` is 0 unless the style is WSD.
    """

    unit: str
    samples_per_unit: int
    lr: float
    min_lr: float
    warmup_init: float
    decay_style: str
    warmup: float
    decay: int
    wsd_decay_style: str
    wsd_decay: int
    start_weight_decay: float
    end_weight_decay: float
    weight_decay_style: str
    weight_decay_length: int

    def progress(self, *, iteration: int, consumed_samples: int, consumed_tokens: int | None = None) -> int:
        """Samples, or tokens, of the updates made so far, in the way the options count: see the module's first lines.

        Raises: ValueError if the schedule counts tokens and they are not given.
        """
        if self.unit == "tokens":
            if consumed_tokens is None:
                raise ValueError("this schedule counts tokens, and the consumed tokens are not given")
            return consumed_tokens
        return iteration * self.samples_per_unit if self.unit == "iterations" else consumed_samples

    def lr_at(self, *, iteration: int, consumed_samples: int, consumed_tokens: int | None = None) -> float:
        """Learning rate of the step made after `iteration` updates, and the samples and tokens of those updates."""
        return _learning_rate(
            self,
            self.progress(iteration=iteration, consumed_samples=consumed_samples, consumed_tokens=consumed_tokens),
        )

    def weight_decay_at(self, *, iteration: int, consumed_samples: int, consumed_tokens: int | None = None) -> float:
        """Weight decay of the step made after `iteration` updates, and the samples and tokens of those updates."""
        return _weight_decay(
            self,
            self.progress(iteration=iteration, consumed_samples=consumed_samples, consumed_tokens=consumed_tokens),
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of numbers and words for a checkpoint; `from_json` takes it back exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ScheduleSettings:
        """The settings that `to_json` gave.

        Raises: CheckpointError if a name is missing or unknown, naming it.
        """
        names = {f.name for f in fields(cls)}
        if set(stored) != names:
            raise CheckpointError(
                "The schedule settings of the checkpoint do not have the expected names: "
                f"missing {sorted(names - set(stored))}, unknown {sorted(set(stored) - names)}; "
                "give --override-opt-param-scheduler to take the schedule from the flags."
            )
        return cls(**stored)


def lr_at(optim: OptimConfig, train: TrainConfig, *, iteration: int, consumed_samples: int) -> float:
    """Learning rate by the flags alone of the step made after `iteration` updates; see `ScheduleSettings.lr_at`."""
    return settings_from_config(optim, train).lr_at(iteration=iteration, consumed_samples=consumed_samples)


def weight_decay_at(optim: OptimConfig, train: TrainConfig, *, iteration: int, consumed_samples: int) -> float:
    """Weight decay by the flags alone of the step made after `iteration` updates."""
    return settings_from_config(optim, train).weight_decay_at(iteration=iteration, consumed_samples=consumed_samples)


def settings_from_config(optim: OptimConfig, train: TrainConfig) -> ScheduleSettings:
    """The schedule that the flags ask for, with every default filled in.

    Raises: ConfigError listing all reasons why these options give no schedule.
    """
    if counts_in_tokens(train, optim) and train.train_iters is None:
        return _settings_in_tokens(optim, train)
    by_samples = train.train_samples is not None
    length = train.train_samples if by_samples else train.train_iters
    if optim.lr is None or length is None or (not by_samples and train.global_batch_size is None):
        raise ConfigError(
            f"The learning-rate schedule needs --lr (given: {optim.lr}), --train-iters or --train-samples "
            f"(given: {length}) and a --global-batch-size (given: {train.global_batch_size}); give what is missing."
        )
    decay = optim.lr_decay_samples if by_samples else optim.lr_decay_iters
    decay = length if decay is None else decay
    warmup = optim.lr_warmup_samples if by_samples else optim.lr_warmup_iters
    wsd_decay = optim.lr_wsd_decay_samples if by_samples else optim.lr_wsd_decay_iters
    problems = _option_problems(optim, by_samples, wsd_decay)
    if problems:
        raise ConfigError("\n".join(problems))
    unit = "samples" if by_samples else "iterations"
    lengths = _Lengths(warmup, decay, (wsd_decay or 0) if optim.lr_decay_style == "WSD" else 0, length)
    return _settings(optim, lengths, unit=unit, samples_per_unit=1 if by_samples else train.global_batch_size)


def settings_like(saved: ScheduleSettings, optim: OptimConfig, train: TrainConfig) -> ScheduleSettings:
    """The schedule that the flags ask for, in tokens where that of a checkpoint is and all its lengths are given so.

    By the flags alone samples of one length are counted, which is the same. But a run that had shorter ones before has
    consumed fewer tokens than its samples say.

    Raises: ConfigError as `settings_from_config`.
    """
    flags = settings_from_config(optim, train)
    has_decay = optim.lr_decay_tokens is not None or (
        train.train_tokens is not None and optim.lr_decay_samples == train.train_samples
    )
    has_warmup = optim.lr_warmup_tokens is not None or not optim.lr_warmup_samples
    if saved.unit != "tokens" or flags.unit != "samples" or flags.decay_style == "WSD":
        return flags
    if not (has_decay and has_warmup):
        return flags
    in_tokens = replace(optim, lr_decay_tokens=optim.lr_decay_tokens or train.train_tokens)
    return _settings_in_tokens(in_tokens, train)


@dataclass(frozen=True)
class _Lengths:
    """Lengths of a schedule in its unit; the warm-up as far as it is no fraction."""

    warmup: float
    decay: int
    wsd_decay: int
    weight_decay: int


def _settings_in_tokens(optim: OptimConfig, train: TrainConfig) -> ScheduleSettings:
    decay = optim.lr_decay_tokens
    if decay is None:
        raise ConfigError("The learning-rate schedule in tokens needs --lr-decay-tokens, or a run in tokens; give one.")
    # A weight decay that is not constant is refused without --train-tokens (`config/rules/lengths.py`).
    lengths = _Lengths(optim.lr_warmup_tokens or 0, decay, 0, train.train_tokens or decay)
    return _settings(optim, lengths, unit="tokens", samples_per_unit=1)


def _settings(optim: OptimConfig, lengths: _Lengths, *, unit: str, samples_per_unit: int) -> ScheduleSettings:
    """The settings with the values that no unit changes. Raises: ConfigError if the formulas make no sense of them."""
    constant_decay = optim.weight_decay_incr_style == "constant"
    start, end = (optim.weight_decay,) * 2 if constant_decay else (optim.start_weight_decay, optim.end_weight_decay)
    assert start is not None and end is not None, "the bounds of the weight decay were checked"
    fraction = optim.lr_warmup_fraction
    settings = ScheduleSettings(
        unit=unit,
        samples_per_unit=samples_per_unit,
        lr=float(optim.lr),
        min_lr=float(optim.min_lr),
        warmup_init=float(optim.lr_warmup_init),
        decay_style=optim.lr_decay_style,
        warmup=lengths.warmup if fraction is None else fraction * lengths.decay,
        decay=lengths.decay,
        wsd_decay_style=optim.lr_wsd_decay_style,
        wsd_decay=lengths.wsd_decay,
        start_weight_decay=float(start),
        end_weight_decay=float(end),
        weight_decay_style=optim.weight_decay_incr_style,
        weight_decay_length=lengths.weight_decay,
    )
    problems = _value_problems(settings)
    if problems:
        raise ConfigError("\n".join(problems))
    return settings


def reconcile(
    saved: ScheduleSettings, flags: ScheduleSettings, *, override: bool, use_checkpoint: bool
) -> ScheduleSettings:
    """The schedule a resumed run follows: the one both agree on, or the one a flag chose.

    Only what changes a rate is compared: a constant schedule has no end, so training it longer is no conflict. Nor is
    another constant weight decay, which people change on purpose as they do the betas: the flags have it.

    Raises: ConfigError if both flags are given, or if the two differ and neither is; it names each differing option,
    both values, and the two flags.
    """
    if override and use_checkpoint:
        raise ConfigError(
            "--override-opt-param-scheduler takes the schedule from the flags and --use-checkpoint-opt_param-scheduler "
            "takes it from the checkpoint; give only one of them."
        )
    if override:
        return flags
    if use_checkpoint:
        return saved
    differences = schedule_differences(_with_constant_weight_decay_of(flags, saved), flags)
    if differences:
        raise ConfigError(
            f"The schedule of the checkpoint is not the one of the flags: {'; '.join(differences)}. Give "
            "--override-opt-param-scheduler to go on with the flags, --use-checkpoint-opt_param-scheduler to go on "
            "with the checkpoint's values, or the same options as before."
        )
    return flags


def _with_constant_weight_decay_of(flags: ScheduleSettings, saved: ScheduleSettings) -> ScheduleSettings:
    """`saved` with the weight decay of `flags`, if it is constant in both."""
    if not flags.weight_decay_style == saved.weight_decay_style == "constant":
        return saved
    return replace(saved, start_weight_decay=flags.start_weight_decay, end_weight_decay=flags.end_weight_decay)


def _learning_rate(settings: ScheduleSettings, progress: int) -> float:
    """The rate after `progress` samples: linear warm-up, then the style's curve from `lr` to `min_lr`."""
    warmup = settings.warmup * settings.samples_per_unit
    decay = settings.decay * settings.samples_per_unit
    if warmup > 0 and progress <= warmup:
        return settings.warmup_init + (settings.lr - settings.warmup_init) * progress / warmup
    if settings.decay_style == "constant":
        return settings.lr
    if progress > decay:
        return settings.min_lr
    if settings.decay_style == "inverse-square-root":
        return max(settings.min_lr, settings.lr * max(warmup, 1) ** 0.5 / max(progress, 1) ** 0.5)
    if settings.decay_style == "WSD":
        wsd_decay = settings.wsd_decay * settings.samples_per_unit
        fraction = max(0, progress - (decay - wsd_decay)) / wsd_decay
        shape = _remaining(settings.wsd_decay_style, fraction)
    else:
        shape = _remaining(settings.decay_style, (progress - warmup) / (decay - warmup))
    return settings.min_lr + shape * (settings.lr - settings.min_lr)


def _remaining(style: str, fraction: float) -> float:
    """How much of the way from `min_lr` up to `lr` is left after this fraction (0 to 1) of the decay: 1 down to 0."""
    if style == "linear":
        return 1.0 - fraction
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * fraction) + 1.0)
    if style == "exponential":
        return 2.0 * 0.5**fraction - 1.0
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(fraction)
    raise ConfigError(f"'{style}' is no shape of a decay; use linear, cosine, exponential or minus_sqrt.")


def _weight_decay(settings: ScheduleSettings, progress: int) -> float:
    """The decay after `progress` samples: from start to end over the whole training, then the end value."""
    length = settings.weight_decay_length * settings.samples_per_unit
    if settings.weight_decay_style == "constant" or progress > length:
        return settings.end_weight_decay
    fraction = progress / length
    # The cosine rises, so it is the falling one read from its end.
    shape = fraction if settings.weight_decay_style == "linear" else _remaining("cosine", 1.0 - fraction)
    return settings.start_weight_decay + shape * (settings.end_weight_decay - settings.start_weight_decay)


def _option_problems(optim: OptimConfig, by_samples: bool, wsd_decay: int | None) -> list[str]:
    """Sentences about options that are missing or exclude each other."""
    problems = []
    unit = "samples" if by_samples else "iters"
    if optim.lr_decay_style == "WSD" and wsd_decay is None:
        problems.append(
            f"--lr-decay-style WSD needs the length of its last phase: give --lr-wsd-decay-{unit} (commonly a tenth "
            "of the training)."
        )
    fixed_warmup = optim.lr_warmup_samples if by_samples else optim.lr_warmup_iters
    if optim.lr_warmup_fraction is not None and fixed_warmup:
        problems.append(
            f"--lr-warmup-fraction {optim.lr_warmup_fraction} and --lr-warmup-{unit} {fixed_warmup} both set the "
            "warm-up; give only one of them."
        )
    bounds = (optim.start_weight_decay, optim.end_weight_decay)
    if optim.weight_decay_incr_style == "constant" and bounds != (None, None):
        problems.append(
            f"--start-weight-decay {bounds[0]} and --end-weight-decay {bounds[1]} mean nothing while "
            "--weight-decay-incr-style is constant; make it linear or cosine, or give --weight-decay alone."
        )
    if optim.weight_decay_incr_style != "constant" and None in bounds:
        problems.append(
            f"--weight-decay-incr-style {optim.weight_decay_incr_style} needs --start-weight-decay (given: "
            f"{bounds[0]}) and --end-weight-decay (given: {bounds[1]}); give both."
        )
    return problems


def _value_problems(settings: ScheduleSettings) -> list[str]:
    """Sentences about numbers for which the formulas make no sense."""
    problems = []
    option = _option_names(settings)
    if not 0.0 <= settings.min_lr <= settings.lr:
        problems.append(f"--min-lr {settings.min_lr} is not between 0 and --lr {settings.lr}; choose it there.")
    if not 0.0 <= settings.warmup_init <= settings.lr:
        problems.append(
            f"--lr-warmup-init {settings.warmup_init} is not between 0 and --lr {settings.lr}; choose it there."
        )
    if settings.decay <= 0 or not 0 <= settings.warmup < settings.decay:
        problems.append(
            f"{option['warmup']} gives a warm-up of {settings.warmup:g} {settings.unit}, which is not at least 0 and "
            f"less than the decay length of {settings.decay} ({option['decay']}); shorten the warm-up."
        )
    if settings.decay_style == "WSD" and not 0 < settings.wsd_decay <= settings.decay:
        problems.append(
            f"{option['wsd_decay']} {settings.wsd_decay} is not between 1 and the decay length of {settings.decay} "
            f"({option['decay']}); choose it there."
        )
    if not 0.0 <= settings.start_weight_decay <= settings.end_weight_decay:
        problems.append(
            f"--start-weight-decay {settings.start_weight_decay} is not between 0 and --end-weight-decay "
            f"{settings.end_weight_decay}; choose it there."
        )
    return problems


def _option_names(settings: ScheduleSettings) -> dict[str, str]:
    """For each field, the option (or options) a user sets it with."""
    unit = "iters" if settings.unit == "iterations" else settings.unit
    constant = settings.weight_decay_style == "constant"
    return {
        "unit": "--lr-decay-tokens" if unit == "tokens" else "--train-iters or --train-samples",
        "samples_per_unit": "--global-batch-size",
        "lr": "--lr",
        "min_lr": "--min-lr",
        "warmup_init": "--lr-warmup-init",
        "decay_style": "--lr-decay-style",
        "warmup": f"--lr-warmup-{unit} or --lr-warmup-fraction",
        "decay": f"--lr-decay-{unit} or --train-{unit}",
        "wsd_decay_style": "--lr-wsd-decay-style",
        "wsd_decay": f"--lr-wsd-decay-{unit}",
        "start_weight_decay": "--weight-decay" if constant else "--start-weight-decay",
        "end_weight_decay": "--weight-decay" if constant else "--end-weight-decay",
        "weight_decay_style": "--weight-decay-incr-style",
        "weight_decay_length": f"--train-{unit}",
    }


def _relevant(settings: ScheduleSettings) -> set[str]:
    """The fields that change a rate under this schedule's styles."""
    names = {f.name for f in fields(ScheduleSettings)}
    if settings.decay_style == "constant":
        names -= {"min_lr", "decay"}
    if settings.decay_style != "WSD":
        names -= {"wsd_decay_style", "wsd_decay"}
    if settings.warmup == 0:
        names -= {"warmup_init"}
    if settings.weight_decay_style == "constant":
        names -= {"weight_decay_length", "start_weight_decay"}
    # Only 1/sqrt(progress) without a warm-up to scale it depends on how many samples an iteration has.
    if settings.unit != "iterations" or settings.decay_style != "inverse-square-root" or settings.warmup > 0:
        names -= {"samples_per_unit"}
    return names


def schedule_differences(saved: ScheduleSettings, flags: ScheduleSettings) -> list[str]:
    """One clause for each option that makes the two schedules differ: "--lr: checkpoint 1, flags 2"."""
    if saved.unit != flags.unit:
        names = ["unit"]  # the lengths are in different units and cannot be compared
    else:
        relevant = _relevant(saved) | _relevant(flags)
        names = [f.name for f in fields(ScheduleSettings) if f.name in relevant]
    old, new = saved.to_json(), flags.to_json()
    return [
        f"{_option_names(flags)[name]}: checkpoint {_shown(old[name])}, flags {_shown(new[name])}"
        for name in names
        if old[name] != new[name]
    ]


def _shown(value: float | int | str) -> str:
    """A number as a user would type it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
