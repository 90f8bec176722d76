"""A schedule in time as monospaced text: one line per pipeline rank, one box per step, dots where a rank is idle."""

from __future__ import annotations

from itertools import groupby

from megatron3d.pipeline.schedule import Op, Step
from megatron3d.pipeline.simulate import TimedStep, Timeline

OP_WORDS = {Op.F: "forward", Op.B: "backward", Op.I: "input gradient", Op.W: "weight gradient"}


def headline(timeline: Timeline) -> str:
    """Name, sizes, span and bubble of the schedule in one line."""
    schedule = timeline.schedule
    stages = f", {schedule.num_stages} stages" if schedule.num_stages != schedule.num_ranks else ""
    return (
        f"{schedule.name}: {schedule.num_ranks} pipeline ranks{stages}, {schedule.num_microbatches} microbatches, "
        f"span {timeline.span:g}, bubble {timeline.bubble_fraction:.1%}"
    )


def step_label(step: Step, timeline: Timeline) -> str:
    """The step in a few characters: F3 is microbatch 3; where ranks hold several stages, F3/5 is its stage 5."""
    schedule = timeline.schedule
    stage = f"/{step.stage}" if schedule.num_stages != schedule.num_ranks else ""
    return f"{step.op.value}{step.mb}{stage}"


def render_text(timeline: Timeline, *, width: int = 120) -> str:
    """The timeline to scale, and what each rank does in numbers.

    The shortest step is just wide enough for every label, so nothing is abbreviated; a timeline wider than `width`
    columns goes on in a further block below. Times are in the unit of the simulation's costs.
    """
    label_width = max(len(step_label(timed.step, timeline)) for timed in timeline.steps) + 1
    shortest = min(timed.end - timed.start for timed in timeline.steps)
    columns_per_time = label_width / shortest
    lines = [_rank_line(rank, timeline, columns_per_time) for rank in range(timeline.schedule.num_ranks)]
    return "\n".join(
        [headline(timeline), _legend(timeline), "", *_blocks(lines, label_width, width), *_rank_table(timeline)]
    )


def _rank_line(rank: int, timeline: Timeline, columns_per_time: float) -> str:
    """One rank's boxes to scale: the label, then dashes to the step's end, and dots for idle time."""
    line = ""
    for timed in timeline.steps:
        if timed.rank == rank:
            start, end = round(timed.start * columns_per_time), round(timed.end * columns_per_time)
            line = line.ljust(start, ".") + _box(timed, timeline, end - start)
    return line.ljust(round(timeline.span * columns_per_time), ".")


def _box(timed: TimedStep, timeline: Timeline, columns: int) -> str:
    """A step in exactly `columns` characters, the last of them blank so that boxes stay apart."""
    return step_label(timed.step, timeline).ljust(columns - 1, "-")[: columns - 1] + " "


def _blocks(lines: list[str], label_width: int, width: int) -> list[str]:
    """The rank lines cut into blocks that fit, at multiples of the shortest step so that its labels stay whole."""
    names = [f"rank {rank}".ljust(len(f"rank {len(lines) - 1}")) + " | " for rank in range(len(lines))]
    room = max((width - len(names[0])) // label_width, 1) * label_width
    blocks = []
    for start in range(0, len(lines[0]), room):
        blocks += [name + line[start : start + room].rstrip() for name, line in zip(names, lines)] + [""]
    return blocks


def _legend(timeline: Timeline) -> str:
    """What the letters and numbers mean, for the ops that occur."""
    ops = [op for op in Op if any(timed.step.op is op for timed in timeline.steps)]
    words = ", ".join(f"{op.value} {OP_WORDS[op]}" for op in ops)
    several = timeline.schedule.num_stages != timeline.schedule.num_ranks
    return f"{words}; the number is the microbatch{', then its stage' if several else ''}; dots are idle time"


def _rank_table(timeline: Timeline) -> list[str]:
    """Busy and idle time and peak live activations; neighbouring ranks with the same numbers share a line."""
    peaks = zip(timeline.peak_live_activations, timeline.peak_in_ranks)
    several = timeline.schedule.num_stages != timeline.schedule.num_ranks
    live = [
        f"{peak} live activations" + (f" (as {share:.3g} of a whole rank)" if several else "") for peak, share in peaks
    ]
    rows = list(zip(timeline.busy, timeline.idle, live))
    lines = []
    for (busy, idle, words), group in groupby(range(len(rows)), key=lambda rank: rows[rank]):
        ranks = list(group)
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        lines.append(f"{who}: busy {busy:g}, idle {idle:g}, at most {words}")
    return lines
