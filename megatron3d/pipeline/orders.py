"""The orders of work by name: each is one function from sizes to a `Schedule`, listed in `ORDERS`.

A new order is one function `(num_ranks, num_microbatches, virtual) -> Schedule` and one line in `ORDERS`: messages,
timing, drawing and execution follow from the rows. `virtual` is the number of stages on each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.schedule import Op, Schedule, Step, check

Order = Callable[[int, int, int], Schedule]


def gpipe(num_ranks: int, num_microbatches: int, virtual: int = 1) -> Schedule:
    """All forwards, then all backwards: the simplest order, which keeps every microbatch's activations alive.

    Raises:
        ScheduleError: if a size is under 1, or `virtual` is not 1.

    Source: Huang et al. 2019, GPipe (arXiv:1811.06965), figure 2c; backwards run in the order of the forwards, so
    that the first one to be needed is also the first one to be ready.
    """
    _require_one_stage_per_rank("gpipe", virtual)
    forwards = [(Op.F, mb) for mb in range(num_microbatches)]
    backwards = [(Op.B, mb) for mb in range(num_microbatches)]
    return _one_stage_per_rank("gpipe", num_microbatches, [forwards + backwards] * num_ranks)


def one_f_one_b(num_ranks: int, num_microbatches: int, virtual: int = 1) -> Schedule:
    """Fill the pipeline, then one forward and one backward in turn: GPipe's bubble with far fewer live activations.

    Rank r starts with min(num_ranks - 1 - r, num_microbatches) forwards, so at most min(num_ranks - r,
    num_microbatches) microbatches are alive there. Fewer microbatches than ranks is allowed: there is no steady part.

    Raises:
        ScheduleError: if a size is under 1, or `virtual` is not 1.

    Source: Narayanan et al. 2021, PipeDream-Flush (arXiv:2006.09503), section 3.2.
    """
    _require_one_stage_per_rank("1f1b", virtual)
    rows = []
    for rank in range(num_ranks):
        warm_up = min(num_ranks - 1 - rank, num_microbatches)
        row = [(Op.F, mb) for mb in range(warm_up)]
        for mb in range(num_microbatches - warm_up):
            row += [(Op.F, warm_up + mb), (Op.B, mb)]
        row += [(Op.B, mb) for mb in range(num_microbatches - warm_up, num_microbatches)]
        rows.append(row)
    return _one_stage_per_rank("1f1b", num_microbatches, rows)


def forward_only(num_ranks: int, num_microbatches: int, virtual: int = 1) -> Schedule:
    """Forwards without backwards, for evaluation and generation; stage s lives on rank s modulo num_ranks.

    With several stages per rank, microbatches pass in groups of `num_ranks`, so that a rank comes back to its next
    stage just when the first microbatch of the group does.

    Raises:
        ScheduleError: if a size is under 1.
    """
    _require_sizes("forward-only", num_ranks, num_microbatches, virtual)
    num_stages = num_ranks * virtual
    rows = []
    for rank in range(num_ranks):
        row = [
            Step(Op.F, stage, mb)
            for group in range(0, num_microbatches, num_ranks)
            for stage in range(rank, num_stages, num_ranks)
            for mb in range(group, min(group + num_ranks, num_microbatches))
        ]
        rows.append(tuple(row))
    places = tuple(stage % num_ranks for stage in range(num_stages))
    return Schedule("forward-only", num_stages, num_microbatches, tuple(rows), places)


ORDERS: Mapping[str, Order] = MappingProxyType(
    {
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "forward-only": forward_only,
    }
)


def build_schedule(name: str, *, num_ranks: int, num_microbatches: int, virtual: int = 1) -> Schedule:
    """The checked schedule of that name for `num_ranks` pipeline ranks with `virtual` stages each.

    Raises:
        ScheduleError: if no order has that name, or the order does not take these sizes.
    """
    if name not in ORDERS:
        near = get_close_matches(name.lower().replace("_", "-"), ORDERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise ScheduleError(f"--pipeline-schedule {name!r} is not known; known are {', '.join(ORDERS)}: {hint}")
    _require_sizes(name, num_ranks, num_microbatches, virtual)
    schedule = ORDERS[name](num_ranks, num_microbatches, virtual)
    check(schedule)
    return schedule


def _one_stage_per_rank(name: str, num_microbatches: int, rows: list[list[tuple[Op, int]]]) -> Schedule:
    """Rows of (op, mb) where stage and rank are the same number."""
    _require_sizes(name, len(rows), num_microbatches, 1)
    steps = tuple(tuple(Step(op, rank, mb) for op, mb in row) for rank, row in enumerate(rows))
    return Schedule(name, len(rows), num_microbatches, steps, tuple(range(len(rows))))


def _require_one_stage_per_rank(name: str, virtual: int) -> None:
    """Refuse virtual stages where the order has no place for them."""
    if virtual != 1:
        raise ScheduleError(
            f"--pipeline-schedule {name} has one stage per rank, but {virtual} virtual stages were asked for; "
            "use 1, or an order that interleaves"
        )


def _require_sizes(name: str, num_ranks: int, num_microbatches: int, virtual: int) -> None:
    """Refuse sizes that leave nothing to do."""
    if min(num_ranks, num_microbatches, virtual) < 1:
        raise ScheduleError(
            f"--pipeline-schedule {name} with {num_ranks} pipeline ranks, {virtual} stages per rank and "
            f"{num_microbatches} microbatches has nothing to run; each must be at least 1"
        )
