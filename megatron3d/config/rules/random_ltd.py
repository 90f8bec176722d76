"""What must hold between the options of random layerwise token dropping, and between them and the model's sizes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.options import OPTIONS
from megatron3d.config.random_ltd import NUM_STRATA, dropping_layers
from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.sections.random_ltd import GivenRandomLtd
from megatron3d.files.user_code import is_user_code

_OF_SCHEDULE = ("random_ltd_min", "random_ltd_max", "random_ltd_steps")
_OWN = tuple(option for option in OPTIONS if option.name in GivenRandomLtd.__dataclass_fields__)


def random_ltd_problems(options: GivenRandomLtd, model: GivenModel, parallel: ParallelConfig) -> Iterator[str]:
    """Layers, schedule and layout of random-LTD."""
    if not options.random_ltd:
        for option in _OWN:
            value = vars(options)[option.name]
            if value != option.default:
                words = " ".join(value) if isinstance(value, tuple) else value
                yield f"{option.spelling} {words} is about --random-ltd; give that too, or leave {option.spelling} out."
        return
    if model.num_layers:
        try:
            dropping_layers(options.random_ltd_layers, model.num_layers)
        except ValueError as error:
            given = " ".join(options.random_ltd_layers) or "(not given)"
            yield f"--random-ltd-layers {given} {error}; name some from 0 to {model.num_layers - 1}."
    if options.random_ltd_router is not None:
        yield from _own_router_problems(options)
        return
    yield from _schedule_problems(options, model.seq_length)
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and parallel.context_parallel_size == 1 and NUM_STRATA % tp:  # else see `context.py`
        yield (
            f"--random-ltd keeps equally many positions of each sixteenth of a sample, and --sequence-parallel cuts "
            f"samples into --tensor-model-parallel-size {tp} shards, which are no whole sixteenths; use 2, 4, 8 or 16 "
            "of them, or no --sequence-parallel."
        )


def _own_router_problems(options: GivenRandomLtd) -> Iterator[str]:
    if not is_user_code(options.random_ltd_router or ""):
        yield (
            f"--random-ltd-router {options.random_ltd_router} names no function of a file or module; write "
            "path/to/file.py:FUNCTION, or leave it out for the random choice."
        )
    for option in _OWN:
        value = vars(options)[option.name]
        if option.name in _OF_SCHEDULE and value is not None:
            yield (
                f"--random-ltd-router {options.random_ltd_router} says itself how many positions are kept, and "
                f"{option.spelling} {value} is about the random choice; leave one of them out."
            )


def _schedule_problems(options: GivenRandomLtd, seq_length: int | None) -> Iterator[str]:
    least, most, size = options.random_ltd_min, options.random_ltd_max, options.random_ltd_step_size
    if least is None:
        yield "--random-ltd needs --random-ltd-min, the positions that layers see at first, such as 128; give it."
    elif least % NUM_STRATA:
        yield f"--random-ltd-min {least} is not a multiple of {NUM_STRATA}; use {_multiple(least)}."
    if size % NUM_STRATA:
        yield f"--random-ltd-step-size {size} is not a multiple of {NUM_STRATA}; use {_multiple(size)}."
    if most is not None and most % NUM_STRATA and most != seq_length:
        yield (
            f"--random-ltd-max {most} is neither a multiple of {NUM_STRATA} nor --seq-length {seq_length}; use "
            f"{_multiple(most)}, or leave it out for all positions."
        )
    if seq_length and (most or 0) > seq_length:
        yield f"--random-ltd-max {most} is above --seq-length {seq_length}; use at most that."
    ends = most or seq_length
    if least is None or ends is None:
        return
    if ends < NUM_STRATA:
        yield f"--random-ltd keeps at least {NUM_STRATA} positions, and samples have {ends}; leave it out."
    elif least > ends:
        option = f"--random-ltd-max {most}" if most else f"--seq-length {seq_length}"
        yield f"--random-ltd-min {least} is above {option}; use at most {ends}."
    elif least < ends and options.random_ltd_steps is None:
        yield (
            f"--random-ltd-min {least} grows to {ends} positions in --random-ltd-steps, which is not given; give it, "
            f"or --random-ltd-max {least} to keep as many in the whole run."
        )


def _multiple(value: int) -> int:
    """The nearest multiple of 16 above 0."""
    return max(1, round(value / NUM_STRATA)) * NUM_STRATA
