"""What the options of random layerwise token dropping mean: which layers drop tokens, and how many they keep when.

Source: DeepSpeed, `deepspeed/runtime/data_pipeline/data_routing/scheduler.py`, `fixed_linear`, for the schedule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron3d.config.sections.random_ltd import GivenRandomLtd

NUM_STRATA = 16  # of consecutive positions of a sample, each of which keeps equally many (`nn/token_dropping.py`)
_SLICE = re.compile(r"-?[0-9]*:-?[0-9]*(:[0-9]*)?")


def dropping_layers(words: Sequence[str], num_layers: int) -> tuple[int, ...]:
    """The layers that drop tokens, ascending: numbers and slices of `--random-ltd-layers`, or all but first and last.

    Raises:
        ValueError: a word is neither, there is no such layer, or none is left; its message is what is wrong, a clause.
    """
    if not words:
        if num_layers < 3:
            raise ValueError(f"is all but the first and the last of {num_layers} layers, which leaves none")
        return tuple(range(1, num_layers - 1))
    found: set[int] = set()
    for word in words:
        if word.isdecimal() and int(word) < num_layers:
            found.add(int(word))
        elif word.isdecimal():
            raise ValueError(f"has {word}, and the last of {num_layers} layers is {num_layers - 1}")
        elif _SLICE.fullmatch(word) and not word.endswith(":0"):
            found.update(range(num_layers)[slice(*(int(part) if part else None for part in word.split(":")))])
        else:
            raise ValueError(f"has {word}, which is no number of a layer and no slice such as 1:-1")
    if not found:
        raise ValueError(f"has none of the {num_layers} layers")
    return tuple(sorted(found))


def positions_kept(options: GivenRandomLtd, step: int, seq_length: int) -> int:
    """How many positions of each sample these layers keep at a step, counted from 0.

    It grows linearly from --random-ltd-min at step 0 to --random-ltd-max at --random-ltd-steps, rounded down to a
    multiple of --random-ltd-step-size on the way; longer samples than that lose the rest, shorter ones nothing.
    """
    most = options.random_ltd_max or seq_length
    least = most if options.random_ltd_min is None else options.random_ltd_min
    steps = options.random_ltd_steps
    if steps is None or step >= steps:
        return most
    wanted = least + (most - least) * step // steps
    return min(max(wanted - wanted % options.random_ltd_step_size, least), most)
