"""Which layers each pipeline stage holds: contiguous ranges, even where they can be, never losing a layer.

Where the layers do not divide, stages differ by at most one layer. The larger ones are the middle stages, earliest
first, then the first stage, then the last one: the first also holds the embedding, the last the output layer and the
loss, and a pipeline is as slow as its slowest stage. `costs` weighs what layers cost, and `layout` reads a
split that the user wrote out.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from megatron3d.errors import ConfigError

_FIRST = "--decoder-first-pipeline-num-layers"
_LAST = "--decoder-last-pipeline-num-layers"
_COUNT_EMBEDDING = "--account-for-embedding-in-pipeline-split"
_COUNT_LOSS = "--account-for-loss-in-pipeline-split"


def split_layers(
    num_layers: int,
    num_stages: int,
    *,
    first: int | None = None,
    last: int | None = None,
    count_embedding: bool = False,
    count_loss: bool = False,
) -> tuple[range, ...]:
    """The layer numbers of each stage, in order.

    `first` and `last` fix the layers of the first and the last stage; the rest is split as evenly as it can be.
    `count_embedding` and `count_loss` treat the embedding and the output layer with the loss as one layer each, so
    that the first and the last stage get one layer less; only then may such a stage have no transformer layer.

    Raises:
        ConfigError: if a stage would be empty, the fixed counts do not add up, or an end is both fixed and counted.
    """
    _check_sizes(num_layers, num_stages)
    _check_fixed_or_counted(_FIRST, first, _COUNT_EMBEDDING, count_embedding)
    _check_fixed_or_counted(_LAST, last, _COUNT_LOSS, count_loss)
    if num_stages == 1:
        _check_single(num_layers, first, last)
        return (range(num_layers),)
    rest = num_layers - (first or 0) - (last or 0)
    open_stages = [s for s in range(num_stages) if not (s == 0 and first) and not (s == num_stages - 1 and last)]
    _check_rest(rest, len(open_stages), counted=count_embedding + count_loss, totals=(num_layers, num_stages))
    counts = dict.fromkeys(range(num_stages), 0)
    counts.update(zip(open_stages, _near_even(rest + count_embedding + count_loss, open_stages, num_stages)))
    counts[0] += (first or 0) - count_embedding
    counts[num_stages - 1] += (last or 0) - count_loss
    return tuple(range(start, end) for start, end in pairwise(accumulate(counts.values(), initial=0)))


def describe(split: tuple[range, ...]) -> str:
    """The split in one line for the run's table: what each stage holds, its layers by number and how many they are."""
    return ", ".join(f"stage {stage}: {_contents(stage, split)}" for stage in range(len(split)))


def _contents(stage: int, split: tuple[range, ...]) -> str:
    """Embedding, layers and output layer of one stage in words."""
    layers = split[stage]
    parts = ["embedding"] if stage == 0 else []
    if len(layers) == 1:
        parts.append(f"layer {layers.start}")
    elif len(layers):
        parts.append(f"layers {layers.start}-{layers.stop - 1} ({len(layers)})")
    if stage == len(split) - 1:
        parts.append("output layer and loss")
    return " + ".join(parts)


def _near_even(num_layers: int, open_stages: list[int], num_stages: int) -> list[int]:
    """Counts for the open stages that differ by at most one; the module's first lines say who gets the extra ones."""
    base, extra = divmod(num_layers, len(open_stages)) if open_stages else (0, 0)
    by_preference = sorted(open_stages, key=lambda stage: (stage in (0, num_stages - 1), stage))
    larger = set(by_preference[:extra])
    return [base + (stage in larger) for stage in open_stages]


def _check_sizes(num_layers: int, num_stages: int) -> None:
    """At least one layer and one stage."""
    if num_layers < 1:
        raise ConfigError(f"--num-layers {num_layers} leaves nothing to split over pipeline stages; give at least 1")
    if num_stages < 1:
        raise ConfigError(f"{num_stages} pipeline stages cannot hold {num_layers} layers; use at least 1 stage")


def _check_fixed_or_counted(option: str, fixed: int | None, switch: str, counted: bool) -> None:
    """An end of the pipeline has a fixed count, or is counted, or neither."""
    if fixed is not None and fixed < 1:
        raise ConfigError(f"{option} {fixed} leaves that stage empty; give at least 1, or drop it and use {switch}")
    if fixed is not None and counted:
        raise ConfigError(f"{option} {fixed} already fixes what {switch} would work out; give only one of the two")


def _check_single(num_layers: int, first: int | None, last: int | None) -> None:
    """With one stage, a fixed count can only repeat the number of layers."""
    for option, fixed in ((_FIRST, first), (_LAST, last)):
        if fixed not in (None, num_layers):
            raise ConfigError(
                f"{option} {fixed} does not fit one pipeline stage that holds all --num-layers {num_layers}; "
                f"drop it, or use more pipeline stages"
            )


def _check_rest(rest: int, num_open: int, *, counted: int, totals: tuple[int, int]) -> None:
    """What the fixed stages leave fits the others: nothing for none of them, else at least one for each."""
    num_layers, num_stages = totals
    if num_open == 0 and rest != 0:
        raise ConfigError(
            f"{_FIRST} and {_LAST} hold {num_layers - rest} layers on {num_stages} stages, but --num-layers is "
            f"{num_layers}; make them add up, or give only one of them"
        )
    if rest + counted < num_open:
        fixed = num_stages - num_open
        held = f" ({num_layers - rest} of them fixed on {fixed} of these stages)" if fixed else ""
        raise ConfigError(
            f"--num-layers {num_layers} cannot fill {num_stages} pipeline stages{held}: {num_open} stages would share "
            f"{max(rest, 0)} layers; use fewer stages or more layers"
        )
