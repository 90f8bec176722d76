"""The orders of work by name: each is one function from sizes to a `Schedule`, listed in `ORDERS`.

A new order is one function `(num_ranks, num_microbatches, virtual) -> Schedule` and one line in `ORDERS`: messages,
timing, drawing and execution follow from the rows. `virtual` is the number of stages on each rank. An order in a
user's own file needs no line here: its name is `module:function` or `path/to/file.py:function`.

The classics stand in this file; the others are in the `orders_*` files beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from megatron3d.errors import ScheduleError
from megatron3d.files.user_code import is_user_code
from megatron3d.pipeline.orders.interleaved import breadth_first, interleaved
from megatron3d.pipeline.orders.placement import require_sizes, round_robin, v_shape
from megatron3d.pipeline.orders.user import build_user_schedule
from megatron3d.pipeline.orders.v_shaped import dualpipe_v, zb_v
from megatron3d.pipeline.orders.zero_bubble import zb_h1, zb_h2
from megatron3d.pipeline.schedule import Op, Schedule, Step, check


def gpipe(num_ranks: int, num_microbatches: int, virtual: int = 1) -> Schedule:
    """All forwards, then all backwards: the simplest order, which keeps every microbatch's activations alive.

    Raises:
        ScheduleError: if a size is under 1, or `virtual` is not 1.

    Source: Huang et al. 2019, GPipe (arXiv:1811.06965), figure 2c; backwards run in the order of the forwards, so
    that the first one to be needed is also the first one to be ready.
    """
    require_sizes("gpipe", num_ranks, num_microbatches, virtual, fixed=1)
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
    require_sizes("1f1b", num_ranks, num_microbatches, virtual, fixed=1)
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

    Raises:
        ScheduleError: if a size is under 1.
    """
    require_sizes("forward-only", num_ranks, num_microbatches, virtual)
    return forward_only_on(round_robin(num_ranks, virtual), num_microbatches)


def forward_only_on(stage_to_rank: tuple[int, ...], num_microbatches: int) -> Schedule:
    """Forwards without backwards for a model whose stages lie anywhere, as the order it trains with has put them.

    Time goes in slots of one forward. Each microbatch enters as early as it can pass all stages without waiting, that
    is, without meeting an earlier one on a rank; rows follow the slots, so nobody ever waits in a circle. On
    round-robin stages, groups of `num_ranks` microbatches follow each other without a gap; on a V, one microbatch
    enters every second slot.

    Raises:
        ScheduleError: if there is no stage or no microbatch.
    """
    num_ranks = max(stage_to_rank, default=-1) + 1
    require_sizes("forward-only", num_ranks, num_microbatches, 1)
    slots: list[dict[int, Step]] = [{} for _ in range(num_ranks)]
    enter = 0
    for mb in range(num_microbatches):
        while any(enter + stage in slots[rank] for stage, rank in enumerate(stage_to_rank)):
            enter += 1
        for stage, rank in enumerate(stage_to_rank):
            slots[rank][enter + stage] = Step(Op.F, stage, mb)
    rows = tuple(tuple(step for _, step in sorted(taken.items())) for taken in slots)
    return Schedule("forward-only", len(stage_to_rank), num_microbatches, rows, tuple(stage_to_rank))


@dataclass(frozen=True)
class Order:
    """An order, how many stages per rank it takes (None: any number), and where it puts them."""

    build: Callable[..., Schedule]
    virtual: int | None
    place: Callable[[int, int], tuple[int, ...]] = round_robin


ORDERS: Mapping[str, Order] = MappingProxyType(
    {
        "gpipe": Order(gpipe, 1),
        "1f1b": Order(one_f_one_b, 1),
        "interleaved": Order(interleaved, None),
        "breadth-first": Order(breadth_first, None),
        "zb-h1": Order(zb_h1, 1),
        "zb-h2": Order(zb_h2, 1),
        "zb-v": Order(zb_v, 2, v_shape),
        "dualpipe-v": Order(dualpipe_v, 2, v_shape),
        "forward-only": Order(forward_only, None),
    }
)


def build_schedule(
    name: str, *, num_ranks: int, num_microbatches: int, virtual: int = 1, group_size: int | None = None
) -> Schedule:
    """The checked schedule of that name for `num_ranks` pipeline ranks with `virtual` stages each.

    `name` is one of `ORDERS`, or points to a user's own function. `group_size` is for `interleaved` only: how many
    microbatches pass one stage before the rank turns to its next one.

    Raises:
        ScheduleError: if no order has that name, the order does not take these sizes, or a user's order is faulty.
    """
    if group_size is not None and name != "interleaved":
        raise ScheduleError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {group_size} has no meaning for --pipeline-schedule "
            f"{name}; drop it, or use --pipeline-schedule interleaved"
        )
    if is_user_code(name):
        require_sizes(name, num_ranks, num_microbatches, virtual)
        schedule = build_user_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches, virtual=virtual)
    else:
        order = _order(name)
        require_sizes(name, num_ranks, num_microbatches, virtual, fixed=order.virtual)
        options = {} if group_size is None else {"group_size": group_size}
        schedule = order.build(num_ranks, num_microbatches, virtual, **options)
    check(schedule)
    return schedule


def placement_of(name: str, *, num_ranks: int, virtual: int, num_microbatches: int | None = None) -> tuple[int, ...]:
    """The pipeline rank of each stage under that order, which does not depend on the number of microbatches.

    A user's order only says so in a schedule: it is asked for one of `num_microbatches`, or twice the ranks.

    Raises:
        ScheduleError: if no order has that name, or the order does not take these sizes.
    """
    if is_user_code(name):
        count = 2 * num_ranks if num_microbatches is None else num_microbatches
        return build_schedule(name, num_ranks=num_ranks, num_microbatches=count, virtual=virtual).stage_to_rank
    order = _order(name)
    require_sizes(name, num_ranks, 1, virtual, fixed=order.virtual)
    return order.place(num_ranks, virtual)


def virtual_of(name: str) -> int | None:
    """How many stages per rank that order always has; None if it takes any number, or is a user's own.

    Raises:
        ScheduleError: if no order has that name.
    """
    return None if is_user_code(name) else _order(name).virtual


def _order(name: str) -> Order:
    """The named order."""
    if name not in ORDERS:
        near = get_close_matches(name.lower().replace("_", "-"), ORDERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise ScheduleError(f"--pipeline-schedule {name!r} is not known; known are {', '.join(ORDERS)}: {hint}")
    return ORDERS[name]


def _one_stage_per_rank(name: str, num_microbatches: int, rows: list[list[tuple[Op, int]]]) -> Schedule:
    """Rows of (op, mb) where stage and rank are the same number."""
    steps = tuple(tuple(Step(op, rank, mb) for op, mb in row) for rank, row in enumerate(rows))
    return Schedule(name, len(rows), num_microbatches, steps, tuple(range(len(rows))))
