"""Several orders side by side at one size: a table of span, bubble and peak live activations.

All of them do the same work: costs are those of a whole rank for one microbatch, so a stage costs 1/V of them where a
rank holds V stages, and activations are counted in units of one microbatch on a whole rank. What several stages cost
besides (V times the messages) is in the simulation if the costs have latency or bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.orders.named import build_schedule
from megatron3d.pipeline.schedule import Schedule
from megatron3d.pipeline.simulate import Costs, Timeline, simulate


@dataclass(frozen=True)
class ComparedOrder:
    """One order of a comparison: its name on the command line, and its simulated timeline."""

    name: str
    timeline: Timeline

    @property
    def stages_per_rank(self) -> int:
        """Stages that each rank holds."""
        return self.timeline.schedule.num_stages // self.timeline.schedule.num_ranks

    @property
    def peaks(self) -> tuple[float, ...]:
        """Peak live activations by rank, in units of one microbatch on a whole rank."""
        return self.timeline.peak_in_ranks


@dataclass(frozen=True)
class Comparison:
    """Orders at one size, and those that were left out, each with the reason."""

    num_ranks: int
    num_microbatches: int
    contenders: tuple[ComparedOrder, ...]
    left_out: tuple[tuple[str, str], ...]


def stage_costs(costs: Costs, schedule: Schedule) -> Costs:
    """The costs of the schedule's stages where `costs` are those of a whole rank: 1/V for V stages on each rank.

    Stage factors, if there are any, multiply on top: they are one per stage of the schedule.
    """
    share = schedule.num_ranks / schedule.num_stages
    factors = costs.stage_factors or (1.0,) * schedule.num_stages
    return replace(costs, stage_factors=tuple(share * factor for factor in factors))


def compare(entrants: Sequence[tuple[str, int]], *, num_ranks: int, num_microbatches: int, costs: Costs) -> Comparison:
    """Simulate several orders with the same work.

    Args:
        entrants: name and stages per rank of each order; those that never train do not do the same work and are left
            out.
        num_ranks: pipeline ranks.
        num_microbatches: microbatches per step.
        costs: of one microbatch on a whole rank, without stage factors.

    Raises:
        ScheduleError: if a cost is unusable, or no order can run at this size.
    """
    if costs.stage_factors:
        raise ScheduleError(
            f"stage factors {costs.stage_factors} name the stages of one schedule, but the schedules of a comparison "
            "have different stages; leave them out, or show one schedule"
        )
    contenders, left_out = [], []
    for name, virtual in entrants:
        try:
            schedule = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches, virtual=virtual)
        except ScheduleError as error:
            left_out.append((name, str(error)))
            continue
        if schedule.has_backward():
            contenders.append(ComparedOrder(name, simulate(schedule, stage_costs(costs, schedule))))
        else:
            left_out.append((name, "it has no backwards"))
    if not contenders:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out)
        raise ScheduleError(f"no schedule can run on {num_ranks} ranks with {num_microbatches} microbatches: {reasons}")
    return Comparison(num_ranks, num_microbatches, tuple(contenders), tuple(left_out))


def render_table(comparison: Comparison) -> str:
    """The comparison as monospaced text: one line per order, its peak live activations by rank."""
    heads = ("schedule", "stages/rank", "span", "bubble", "peak live activations by rank")
    rows = [
        (
            contender.name,
            str(contender.stages_per_rank),
            f"{contender.timeline.span:.6g}",
            f"{contender.timeline.bubble_fraction:.1%}",
            _peaks_text(contender.peaks),
        )
        for contender in comparison.contenders
    ]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = [_table_line(row, widths) for row in (heads, *rows)]
    out = [f"left out: {name}: {reason}" for name, reason in comparison.left_out]
    return "\n".join([comparison_headline(comparison), "", *lines, "", _UNITS, *out])


_UNITS = "activations: 1 is those of one microbatch on all stages of a rank"


def comparison_headline(comparison: Comparison) -> str:
    """The sizes that all orders have in common."""
    return f"{comparison.num_ranks} pipeline ranks, {comparison.num_microbatches} microbatches"


def _table_line(row: tuple[str, ...], widths: list[int]) -> str:
    """Names and peaks to the left, numbers to the right."""
    name, *numbers, peaks = row
    return "  ".join([name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:])), peaks])


def _peaks_text(peaks: tuple[float, ...]) -> str:
    """Equal peaks once, otherwise from rank 0 on."""
    words = [f"{peak:.3g}" for peak in peaks]
    return f"{words[0]} on each" if len(set(words)) == 1 else " ".join(words)
