"""Orders for several stages per rank, placed round-robin: the model runs several times through all ranks.

A rank then waits for a part of the model only where it waited for the whole rank before, so that the bubble shrinks by
the number of stages per rank; messages grow by the same factor.
"""

from __future__ import annotations

from itertools import pairwise

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.orders.placement import require_sizes, round_robin
from megatron3d.pipeline.schedule import Op, Schedule, Step


def interleaved(num_ranks: int, num_microbatches: int, virtual: int = 1, *, group_size: int | None = None) -> Schedule:
    """One forward and one backward in turn, over microbatches that pass the stages of a rank in groups.

    A group passes one stage of the rank, then the next one, until it has passed all; backwards go the same way from
    the last stage. Rank r starts with 2 (num_ranks - 1 - r) + (virtual - 1) x group forwards, and so holds one more
    (stage, microbatch) at most. `group_size` is `num_ranks` unless given; larger groups give messages more time and
    hold more activations. With one stage per rank this is 1F1B.

    A last group smaller than `num_ranks` would leave holes, and for some sizes a circle of waiting, so Megatron-LM
    refuses it. Here its microbatches join the other groups, which grow by as little as possible: there is no hole.
    Fewer microbatches than ranks make one group.

    Raises:
        ScheduleError: if a size is under 1, or `group_size` is under `num_ranks`.

    Source: Narayanan et al. 2021, Megatron-LM on GPU clusters (arXiv:2104.04473), section 2.2.2 and figure 4; the
    group is that of Megatron-LM's --microbatch-group-size-per-virtual-pipeline-stage.
    """
    require_sizes("interleaved", num_ranks, num_microbatches, virtual)
    groups = _groups(num_ranks, num_microbatches, num_ranks if group_size is None else group_size)
    order = [(turn, mb) for group in groups for turn in range(virtual) for mb in group]
    rows = []
    for rank in range(num_ranks):
        forwards = [Step(Op.F, turn * num_ranks + rank, mb) for turn, mb in order]
        backwards = [Step(Op.B, (virtual - 1 - turn) * num_ranks + rank, mb) for turn, mb in order]
        warm_up = (num_ranks - 1 - rank) * (2 if virtual > 1 else 1) + (virtual - 1) * len(groups[0])
        row = forwards[:warm_up]
        for forward, backward in zip(forwards[warm_up:], backwards):
            row += [forward, backward]
        rows.append((*row, *backwards[len(forwards[warm_up:]) :]))
    places = round_robin(num_ranks, virtual)
    return Schedule("interleaved", len(places), num_microbatches, tuple(rows), places)


def breadth_first(num_ranks: int, num_microbatches: int, virtual: int = 1) -> Schedule:
    """All microbatches pass a rank's first stage, then all its second, and so on; then backwards the same way.

    The bubble is that of `interleaved`. Every activation is alive at the turn, but a stage is needed in one stretch of
    time only, forward and backward: its weights are gathered once, and its gradients reduced once, far before the end.
    With one stage per rank this is GPipe.

    Raises:
        ScheduleError: if a size is under 1.

    Source: Lamy-Poirier 2023, Breadth-First Pipeline Parallelism (arXiv:2211.05953).
    """
    require_sizes("breadth-first", num_ranks, num_microbatches, virtual)
    places = round_robin(num_ranks, virtual)
    rows = []
    for rank in range(num_ranks):
        stages = range(rank, len(places), num_ranks)
        forwards = [Step(Op.F, stage, mb) for stage in stages for mb in range(num_microbatches)]
        backwards = [Step(Op.B, stage, mb) for stage in reversed(stages) for mb in range(num_microbatches)]
        rows.append((*forwards, *backwards))
    return Schedule("breadth-first", len(places), num_microbatches, tuple(rows), places)


def _groups(num_ranks: int, num_microbatches: int, group_size: int) -> list[range]:
    """The microbatches in groups of `group_size`; a rest under `num_ranks` is spread over the other groups."""
    if group_size < num_ranks:
        raise ScheduleError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {group_size} is under the {num_ranks} pipeline ranks: "
            f"each rank would wait for a microbatch to come round; use at least {num_ranks}"
        )
    count, rest = divmod(num_microbatches, group_size)
    if count == 0:
        return [range(num_microbatches)]
    if rest == 0 or rest >= num_ranks:
        return [range(at, min(at + group_size, num_microbatches)) for at in range(0, num_microbatches, group_size)]
    size, larger = divmod(num_microbatches, count)
    starts = [group * size + min(group, larger) for group in range(count + 1)]
    return [range(start, end) for start, end in pairwise(starts)]
