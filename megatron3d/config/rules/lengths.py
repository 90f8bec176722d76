"""What must hold between a sequence-length curriculum and the model, the layout and the counts of a run.

Each rule yields sentences, as in `rules/run.py`. All lengths of the whole schedule are looked at before a run starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron3d.config.lengths import counts_in_tokens, length_levels
from megatron3d.config.options import BY_NAME
from megatron3d.config.rules.context import length_multiple
from megatron3d.config.sections.lengths import LENGTH_PREFIX, LengthConfig
from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.optim import GivenOptim
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.sections.train import DraftTrain, GivenTrain
from megatron3d.errors import ConfigError

_SHOWN = 5  # lengths that a sentence lists


def lengths_rule(
    lengths: LengthConfig, model: GivenModel, train: GivenTrain, parallel: ParallelConfig
) -> Iterator[str]:
    """Every length of the schedule is one that samples and ranks can have."""
    if lengths.seq_length_curriculum is None:
        yield from _without_curriculum(lengths)
        return
    if model.traits.samples != "tokens":
        yield (
            f"{LENGTH_PREFIX} {lengths.seq_length_curriculum} cuts samples of running text, and those of a "
            f"{model.traits.title} are pairs of sentences; leave it out."
        )
    if train.step_batch_size_schedule:
        yield (
            f"--step-batch-size-schedule '{train.step_batch_size_schedule}' counts tokens of full samples, and "
            f"{LENGTH_PREFIX} has shorter ones; use --rampup-batch-size, which counts samples."
        )
    if train.random_ltd_router is not None:
        yield (
            f"--random-ltd-router {train.random_ltd_router} chooses positions of full samples, and {LENGTH_PREFIX} has "
            "shorter ones; leave out one of the two."
        )
    if not model.seq_length:
        return
    try:
        levels = length_levels(lengths, model.seq_length)
    except ConfigError as error:
        yield from str(error).splitlines()
        return
    yield from _level_problems(lengths, [length for _, length in levels], model.seq_length, length_multiple(parallel))


def _without_curriculum(lengths: LengthConfig) -> Iterator[str]:
    for name, value in vars(lengths).items():
        option = BY_NAME[name]
        if value != option.default:
            yield (
                f"{option.spelling} {value} means nothing without {LENGTH_PREFIX}; give {LENGTH_PREFIX} truncate or "
                "reshape, or leave it out."
            )


def _level_problems(
    lengths: LengthConfig, found: Sequence[int], seq_length: int, cut: tuple[int, str]
) -> Iterator[str]:
    """Lengths that no sample or no rank can have."""
    multiple, option = cut
    if short := [length for length in found if length < 1]:
        yield (
            f"{LENGTH_PREFIX}-pacing {lengths.seq_length_curriculum_pacing} gives the length {short[0]}; a sample "
            f"has at least 1 token, so raise {LENGTH_PREFIX}-min-difficulty."
        )
    if long := [length for length in found if length > seq_length]:
        yield (
            f"{LENGTH_PREFIX}-pacing {lengths.seq_length_curriculum_pacing} gives the length {max(long)}, which is "
            f"more than --seq-length {seq_length}; lower {LENGTH_PREFIX}-max-difficulty to at most that."
        )
    if uneven := sorted({length for length in found if length % multiple}):
        more = f" and {len(uneven) - _SHOWN} more" if len(uneven) > _SHOWN else ""
        yield (
            f"{LENGTH_PREFIX} has the length{'s' if len(uneven) > 1 else ''} "
            f"{', '.join(map(str, uneven[:_SHOWN]))}{more}, no multiples of {multiple}, as {option} ask for; use "
            f"multiples of {multiple}, such as by {LENGTH_PREFIX}-difficulty-step {multiple}."
        )


def token_rates_rule(optim: GivenOptim, derived: GivenOptim, train: DraftTrain) -> Iterator[str]:
    """A learning rate that follows tokens, of which samples have different numbers, has all its lengths in them.

    `train` has what is derived, as `derived` has of `optim`.
    """
    if not counts_in_tokens(train, optim) or train.train_iters is not None:
        return
    samples = ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples")
    for name in samples:
        if value := vars(optim)[name]:
            yield (
                f"{BY_NAME[name].spelling} {value} counts samples, and the learning rate follows tokens, of which "
                f"samples have different numbers under {LENGTH_PREFIX}; give all lengths of the schedule in tokens."
            )
    if optim.lr_decay_style == "WSD":
        yield (
            "--lr-decay-style WSD has its last phase in samples, and the learning rate follows tokens; use another "
            "style, or --lr-decay-samples and --lr-warmup-samples."
        )
    if optim.lr_warmup_tokens and optim.lr_warmup_fraction is not None:
        yield (
            f"--lr-warmup-fraction {optim.lr_warmup_fraction:g} and --lr-warmup-tokens {optim.lr_warmup_tokens} both "
            "set the warm-up; give only one of them."
        )
    decay = derived.lr_decay_tokens
    if decay and optim.lr_warmup_tokens and optim.lr_warmup_tokens >= decay:
        yield (
            f"--lr-warmup-tokens {optim.lr_warmup_tokens} is not shorter than the decay of {decay} tokens "
            "(--lr-decay-tokens, or those of the run); use a shorter warm-up, or a longer decay."
        )
    if optim.weight_decay_incr_style != "constant" and train.train_tokens is None:
        yield (
            f"--weight-decay-incr-style {optim.weight_decay_incr_style} follows the length of the run in tokens, which "
            "is given in samples; give --train-tokens."
        )
