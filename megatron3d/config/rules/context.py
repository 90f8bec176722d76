"""What context parallelism asks of samples, of the model and of other options."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron3d.config.architectures import named
from megatron3d.config.random_ltd import NUM_STRATA
from megatron3d.config.rules.exchange import exchange_problems
from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.parallel import CONTEXT_COMM_TYPES, ParallelConfig
from megatron3d.config.sections.train import DraftTrain

_CP = "--context-parallel-size"


def context_problems(model: GivenModel, parallel: ParallelConfig, train: DraftTrain) -> Iterator[str]:
    """What does not go together with samples that are cut over ranks."""
    yield from _kind_problems(parallel, model.num_layers)
    yield from exchange_problems(model, parallel)
    if parallel.context_parallel_size == 1:
        return
    yield from _length_problems(model, parallel)
    yield from _model_problems(model, parallel)
    multiple, why = length_multiple(parallel)
    if train.random_ltd and parallel.context_cut == "balanced":
        yield (
            "--random-ltd keeps equally many positions of each sixteenth of a sample, and --cp-cut balanced gives "
            "ranks other parts of each; use --cp-cut zigzag or contiguous."
        )
    elif train.random_ltd and train.random_ltd_router is None and NUM_STRATA % multiple:
        yield (
            f"--random-ltd keeps equally many positions of each sixteenth of a sample, and {why} cut samples into "
            f"{multiple} parts, which are no whole sixteenths; use fewer ranks for each sample."
        )


def _kind_problems(parallel: ParallelConfig, num_layers: int | None) -> Iterator[str]:
    """Kinds of attention over context-parallel ranks."""
    kinds = parallel.cp_comm_type
    for kind in dict.fromkeys(kinds):
        if kind not in CONTEXT_COMM_TYPES:
            yield f"--cp-comm-type {kind} is none of {', '.join(CONTEXT_COMM_TYPES)}; use one of these."
    if num_layers and len(kinds) > 1 and len(kinds) != num_layers:
        yield (
            f"--cp-comm-type {' '.join(kinds)} has {len(kinds)} kinds for --num-layers {num_layers}; give one for all "
            "layers, or one for each."
        )


def length_multiple(parallel: ParallelConfig) -> tuple[int, str]:
    """What the length of every sample must be a multiple of, and which options ask for it; 1 where none does."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    shards = tp if parallel.sequence_parallel else 1
    if cp == 1:
        return shards, f"--sequence-parallel with --tensor-model-parallel-size {tp}"
    chunks = cp if parallel.context_cut == "contiguous" else 2 * cp
    beside = f" and --sequence-parallel with --tensor-model-parallel-size {tp}" if shards > 1 else ""
    return math.lcm(chunks, cp * shards), f"{_CP} {cp} (--cp-cut {parallel.context_cut}){beside}"


def _length_problems(model: GivenModel, parallel: ParallelConfig) -> Iterator[str]:
    """Samples, of any step, that have no equal parts. A schedule of lengths has a rule of its own."""
    multiple, why = length_multiple(parallel)
    length = model.seq_length
    if not length or not length % multiple:
        return
    below = length // multiple * multiple
    sizes = f"{below} or {below + multiple}" if below else str(multiple)
    reason = "has fewer tokens than" if length < multiple else "is not a multiple of"
    yield (f"--seq-length {length} {reason} {multiple}, as {why} ask for; use --seq-length {sizes}, or fewer ranks.")


def _model_problems(model: GivenModel, parallel: ParallelConfig) -> Iterator[str]:
    """What a model has that cannot be computed on parts of samples."""
    cp = parallel.context_parallel_size
    if model.attention_dropout:
        yield (
            f"--attention-dropout {model.attention_dropout:g} with {_CP} {cp} would draw other masks than one process "
            "does: fused attention kernels draw by their own rows and columns, which here are those of one rank; use "
            "--attention-dropout 0 (--hidden-dropout is the same at every layout)."
        )
    if not model.is_causal and parallel.cp_cut == "balanced":
        yield (
            f"--cp-cut balanced gives ranks the same area of causal attention, and that of {named(model.architecture)} "
            "is not causal; use contiguous, or leave it out."
        )
