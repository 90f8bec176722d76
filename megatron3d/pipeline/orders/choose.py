"""`--pipeline-schedule auto`: simulate every named order that can run, and take the shortest that fits.

Every order is simulated with all its microbatches, so the figures are those of the step that will run; the largest
case at hand, 16 ranks with up to 4 stages each and 512 microbatches, takes about a second for each order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.orders.named import ORDERS, build_schedule
from megatron3d.pipeline.simulate import Costs, Timeline, simulate

_NEEDS_BACKWARD = tuple(name for name in ORDERS if name != "forward-only")
# With one stage per rank these are 1f1b and gpipe, step by step.
_SAME_AS_ANOTHER_IF_ALONE = ("interleaved", "breadth-first")
_SAME_SPAN_DIGITS = 9  # spans are sums of many floats; beyond these digits a difference is rounding


@dataclass(frozen=True)
class ConsideredOrder:
    """One order that was looked at, with its simulated figures.

    Attributes:
        name: the order.
        virtual: stages on each rank.
        span: of one training step, in the unit of the costs.
        bubble: idle share of all ranks' time.
        peak: most activations alive on any rank, in units of one microbatch on a whole rank.
        dropped: why it cannot be taken; empty if it can.
    """

    name: str
    virtual: int
    span: float
    bubble: float
    peak: float
    dropped: str = ""


@dataclass(frozen=True)
class OrderChoice:
    """The order to train with, and all that were considered, in the order of the table of orders."""

    name: str
    virtual: int
    considered: tuple[ConsideredOrder, ...]


def choose(
    num_ranks: int,
    num_microbatches: int,
    virtuals: Sequence[int],
    costs_of: Callable[[int], Costs],
    fits: Callable[[Timeline], bool],
) -> OrderChoice:
    """The shortest order among those that fit; of equally short ones, the one with the fewest live activations.

    Args:
        num_ranks: pipeline ranks.
        num_microbatches: microbatches of a training step.
        virtuals: the numbers of stages per rank that the model can be cut into.
        costs_of: costs of the stages for a number of stages per rank: a stage of V has 1/V of the rank's layers.
        fits: whether a simulated order fits the memory; it sees the live activations and the placement.

    Raises:
        ScheduleError: if a size is under 1, or no order fits.
    """
    candidates = [(name, virtual) for name in _NEEDS_BACKWARD for virtual in virtuals if _takes(name, virtual)]
    if not candidates:
        raise ScheduleError(
            f"--pipeline-schedule auto has no order for {list(virtuals)} stages per rank; allow at least one of 1 and 2"
        )
    considered = []
    for name, virtual in candidates:
        schedule = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches, virtual=virtual)
        timeline = simulate(schedule, costs_of(virtual))
        dropped = "" if fits(timeline) else "its live activations do not fit the memory limit"
        figures = (timeline.span, timeline.bubble_fraction, max(timeline.peak_in_ranks))
        considered.append(ConsideredOrder(name, virtual, *figures, dropped))
    left = [one for one in considered if not one.dropped]
    if not left:
        raise ScheduleError(_nothing_fits(considered))
    best = min(left, key=lambda one: (float(f"{one.span:.{_SAME_SPAN_DIGITS}g}"), one.peak))
    return OrderChoice(best.name, best.virtual, tuple(considered))


def _takes(name: str, virtual: int) -> bool:
    """Whether that order is worth a look at that number of stages per rank."""
    fixed = ORDERS[name].virtual
    return virtual == fixed or (fixed is None and not (virtual == 1 and name in _SAME_AS_ANOTHER_IF_ALONE))


def _nothing_fits(considered: Sequence[ConsideredOrder]) -> str:
    """The sentence that says which order comes closest."""
    least = min(considered, key=lambda one: one.peak)
    stages = "one stage" if least.virtual == 1 else f"{least.virtual} stages"
    return (
        f"--pipeline-schedule auto: none of the {len(considered)} orders fits the memory limit; {least.name} with "
        f"{stages} per rank holds the least, activations of {least.peak:.3g} microbatches on a whole rank; raise "
        "--pipeline-memory-limit-gb, or use a smaller micro-batch, recomputation, or more pipeline ranks"
    )
