"""A schedule in time as a picture fit for a slide. Apart from `text`, so that text needs no matplotlib.

`draw_png` draws one timeline, simulated or measured; `timeline_rows` draws only its boxes, for pictures of several.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from megatron3d.pipeline.draw.text import OP_WORDS
from megatron3d.pipeline.schedule import Op, Step
from megatron3d.pipeline.simulate import Timeline
from megatron3d.storage.refusals import storage_errors

Colour = tuple[float, float, float]

# Distinct for colour-blind readers too, by hue and by lightness (after Okabe and Ito).
OP_COLOURS = {Op.F: "#2F6DB5", Op.B: "#1B9E77", Op.I: "#56BFD6", Op.W: "#E8A33D"}
IDLE_COLOUR = "#ECEEF1"
INK = "#22262B"

_INCH_PER_SHORTEST_STEP = 0.34
_WIDTH_LIMITS_INCHES = (9.0, 26.0)
_ROW_HEIGHT_INCHES = 0.46
_POINTS_PER_INCH = 72
_DIGIT_PER_FONT_SIZE = 0.64  # width of a digit of the default font in units of its size
_SMALLEST_FONT, _LARGEST_FONT = 6.0, 11.0  # points; smaller numbers would only be noise
_WIDEST_GAP_POINTS = 0.8  # white between two boxes; less where boxes are narrow, so that colour stays the main thing
_GAP_PER_BOX = 0.12
_PALEST = 0.58  # how far the last stage of a rank goes from its colour to white


def draw_png(timeline: Timeline, path: Path, *, title: str | None = None, unit: str = "") -> None:
    """Draw the timeline to scale into a PNG file: time to the right, one row per pipeline rank, rank 0 on top.

    Args:
        timeline: simulated, or measured from a run.
        path: the file.
        title: heading; by default the schedule's name.
        unit: the unit of its times, such as "ms"; a simulation has its own.

    Raises:
        StorageError: if the file cannot be written.
    """
    schedule = timeline.schedule
    typical = _lower_quarter(sorted(timed.end - timed.start for timed in timeline.steps))
    width = min(
        max(timeline.span / typical * _INCH_PER_SHORTEST_STEP, _WIDTH_LIMITS_INCHES[0]), _WIDTH_LIMITS_INCHES[1]
    )
    rows = schedule.num_ranks * _ROW_HEIGHT_INCHES
    figure = Figure(figsize=(width + 2.4, rows + 1.65), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.9 / (width + 2.4), 0.75 / (rows + 1.65), width / (width + 2.4), rows / (rows + 1.65)))
    inches_per_time = width / timeline.span
    timeline_rows(axes, timeline, inches_per_time=inches_per_time)
    _draw_numbers(axes, timeline, inches_per_time=inches_per_time)
    _draw_frame(axes, timeline)
    _draw_titles(axes, timeline, title=title or f"{schedule.name} pipeline schedule", unit=unit)
    write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """Store a figure as a PNG file.

    Raises:
        StorageError: if the file cannot be written.
    """
    with storage_errors("write the picture", path, way_out="choose another --png file"):
        figure.savefig(path, dpi=160, format="png")


def timeline_rows(axes: Axes, timeline: Timeline, *, inches_per_time: float, first_row: float = 0.0) -> None:
    """One row of boxes for each rank, 1 high, downwards from `first_row`; grey is time without work."""
    typical = _lower_quarter(sorted(timed.end - timed.start for timed in timeline.steps))
    gap = min(_WIDEST_GAP_POINTS, _GAP_PER_BOX * typical * inches_per_time * _POINTS_PER_INCH)
    shades = step_colours(timeline)
    ranks = range(timeline.schedule.num_ranks)
    idle = [Rectangle((0, first_row + rank - 0.44), timeline.span, 0.88) for rank in ranks]
    axes.add_collection(PatchCollection(idle, facecolor=IDLE_COLOUR, linewidth=0))
    boxes = [
        Rectangle((timed.start, first_row + timed.rank - 0.44), timed.end - timed.start, 0.88)
        for timed in timeline.steps
    ]
    colours = [shades[timed.step] for timed in timeline.steps]
    axes.add_collection(PatchCollection(boxes, facecolor=colours, edgecolor="white", linewidth=gap))


def step_colours(timeline: Timeline) -> dict[Step, Colour]:
    """The colour of each step: its op's; where a rank holds several stages, the later ones are paler."""
    paleness: dict[int, float] = {}
    for rank in range(timeline.schedule.num_ranks):
        mine = [stage for stage, place in enumerate(timeline.schedule.stage_to_rank) if place == rank]
        paleness.update({stage: _paleness(number, len(mine)) for number, stage in enumerate(mine)})
    return {timed.step: _paler(OP_COLOURS[timed.step.op], paleness[timed.step.stage]) for timed in timeline.steps}


def legend_of_ops(
    figure: Figure | SubFigure, ops: list[Op], *, stages_per_rank: int, left: float, bottom: float
) -> None:
    """One entry per op, with a swatch for each stage of a rank in its shade, and one for idle time."""
    handles: list[Patch | tuple[Patch, ...]] = [
        tuple(
            Patch(facecolor=_paler(OP_COLOURS[op], _paleness(number, stages_per_rank)))
            for number in range(stages_per_rank)
        )
        for op in ops
    ]
    handles.append(Patch(facecolor=IDLE_COLOUR))
    figure.legend(
        handles=handles,
        labels=[*(OP_WORDS[op] for op in ops), "idle"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="lower left",
        bbox_to_anchor=(left, bottom),
        ncols=len(handles),
        frameon=False,
        fontsize=11,
        handlelength=0.5 + 0.8 * min(stages_per_rank, 4),
        handleheight=1.1,
        borderaxespad=0,
        borderpad=0.2,
    )


def ops_of(timeline: Timeline) -> list[Op]:
    """The ops that occur."""
    present = {timed.step.op for timed in timeline.steps}
    return [op for op in Op if op in present]


def stages_per_rank(timeline: Timeline) -> int:
    """Most stages that a rank of the timeline's schedule holds."""
    places = timeline.schedule.stage_to_rank
    return max(places.count(rank) for rank in set(places))


def _lower_quarter(durations: list[float]) -> float:
    """A duration that most steps reach: the shortest one of a measured run may be an outlier."""
    return durations[len(durations) // 4]


def _paleness(number: int, of: int) -> float:
    """How far the stage with this number among the `of` stages of its rank goes towards white."""
    return _PALEST * number / max(of - 1, 1)


def _paler(colour: str, paleness: float) -> Colour:
    red, green, blue = (part + (1 - part) * paleness for part in to_rgb(colour))
    return red, green, blue


def _draw_numbers(axes: Axes, timeline: Timeline, *, inches_per_time: float) -> None:
    """The microbatch in each box, where the numbers of that op fit."""
    sizes = _font_sizes(timeline, inches_per_time)
    shades = step_colours(timeline)
    for timed in timeline.steps:
        size = sizes[timed.step.op]
        if size >= _SMALLEST_FONT:
            axes.text(
                (timed.start + timed.end) / 2,
                timed.rank,
                str(timed.step.mb),
                ha="center",
                va="center_baseline",
                color=INK if sum(shades[timed.step]) > 1.75 else "white",
                fontsize=size,
            )


def _font_sizes(timeline: Timeline, inches_per_time: float) -> dict[Op, float]:
    """One font size per op, such that its longest number fits into nearly all of its boxes."""
    digits = len(str(timeline.schedule.num_microbatches - 1))
    sizes = {}
    for op in ops_of(timeline):
        widths = sorted(timed.end - timed.start for timed in timeline.steps if timed.step.op is op)
        room_points = widths[len(widths) // 20] * inches_per_time * _POINTS_PER_INCH
        sizes[op] = min(_LARGEST_FONT, room_points / ((digits + 0.3) * _DIGIT_PER_FONT_SIZE))
    return sizes


def _draw_frame(axes: Axes, timeline: Timeline) -> None:
    """Axes: ranks downwards on the left, peak live activations on the right, time below."""
    ranks = range(timeline.schedule.num_ranks)
    axes.set_xlim(0, timeline.span)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_yticks(list(ranks), [f"rank {rank}" for rank in ranks], fontsize=11, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=timeline.span >= 12))
    axes.tick_params(axis="both", length=0, colors=INK)
    axes.tick_params(axis="x", labelsize=9, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for rank, peak in enumerate(timeline.peak_in_ranks):
        axes.annotate(
            f"{peak:.3g}",
            (1, rank),
            xycoords=("axes fraction", "data"),
            xytext=(34, 0),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=11,
            color=INK,
        )


def _draw_titles(axes: Axes, timeline: Timeline, *, title: str, unit: str) -> None:
    """Title, bubble, the heading of the right column, and the legend of the ops that occur."""
    schedule = timeline.schedule
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "color": INK, "annotation_clip": False}
    axes.annotate(title, (0, 1), xytext=(0, 27), fontsize=17, fontweight="bold", va="baseline", **place)
    several = schedule.num_stages != schedule.num_ranks
    stages = f" · {schedule.num_stages} stages (a rank's later ones paler)" if several else ""
    facts = (
        f"{schedule.num_ranks} ranks{stages} · {schedule.num_microbatches} microbatches · "
        f"bubble {timeline.bubble_fraction:.1%} · span {timeline.span:.4g}{f' {unit}' if unit else ''}"
    )
    axes.annotate(facts, (0, 1), xytext=(0, 9), fontsize=11.5, va="baseline", **place)
    axes.annotate("peak live\nactivations", (1, 1), xytext=(34, 6), fontsize=9, ha="center", va="baseline", **place)
    left = axes.get_position().x0
    legend_of_ops(axes.figure, ops_of(timeline), stages_per_rank=stages_per_rank(timeline), left=left, bottom=0.01)
    axes.annotate(f"time{f', {unit}' if unit else ''}", (1, 0), xytext=(20, -3), fontsize=9, va="top", **place)
