"""A schedule in time as a picture fit for a slide. Apart from `render`, so that text needs no matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from megatron3d.errors import StorageError
from megatron3d.pipeline.render import OP_WORDS
from megatron3d.pipeline.schedule import Op
from megatron3d.pipeline.simulate import TimedStep, Timeline

# Told apart by colour-blind readers too, by hue and by lightness (after Okabe and Ito).
OP_COLOURS = {Op.F: "#2F6DB5", Op.B: "#1B9E77", Op.I: "#56BFD6", Op.W: "#E8A33D"}
IDLE_COLOUR = "#ECEEF1"
INK = "#22262B"

_INCH_PER_SHORTEST_STEP = 0.34
_WIDTH_LIMITS_INCHES = (9.0, 26.0)
_ROW_HEIGHT_INCHES = 0.46
_POINTS_PER_INCH = 72
_DIGIT_PER_FONT_SIZE = 0.64  # width of a digit of the default font in units of its size
_SMALLEST_FONT, _LARGEST_FONT = 6.0, 11.0  # points; smaller numbers would only be noise


def draw_png(timeline: Timeline, path: Path, *, title: str | None = None) -> None:
    """Draw the timeline to scale into a PNG file: time to the right, one row per pipeline rank, rank 0 on top.

    Raises:
        StorageError: if the file cannot be written.
    """
    schedule = timeline.schedule
    shortest = min(timed.end - timed.start for timed in timeline.steps)
    wanted = timeline.span / shortest * _INCH_PER_SHORTEST_STEP
    width = min(max(wanted, _WIDTH_LIMITS_INCHES[0]), _WIDTH_LIMITS_INCHES[1])
    rows = schedule.num_ranks * _ROW_HEIGHT_INCHES
    figure = Figure(figsize=(width + 2.4, rows + 1.65), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.9 / (width + 2.4), 0.75 / (rows + 1.65), width / (width + 2.4), rows / (rows + 1.65)))
    _draw_steps(axes, timeline, inches_per_time=width / timeline.span)
    _draw_frame(axes, timeline)
    _draw_words(axes, timeline, title=title or f"{schedule.name} pipeline schedule")
    try:
        figure.savefig(path, dpi=160, format="png")
    except OSError as error:
        raise StorageError(f"cannot write the picture {path}: {error.strerror}; choose another --png file") from error


def _draw_steps(axes: Axes, timeline: Timeline, *, inches_per_time: float) -> None:
    """Idle background and one box per step, with its microbatch where the numbers of that op fit."""
    for rank in range(timeline.schedule.num_ranks):
        axes.add_patch(Rectangle((0, rank - 0.44), timeline.span, 0.88, facecolor=IDLE_COLOUR, linewidth=0))
    sizes = _font_sizes(timeline, inches_per_time)
    for timed in timeline.steps:
        colour = _colour(timed, timeline)
        place = (timed.start, timed.rank - 0.44)
        box = Rectangle(place, timed.end - timed.start, 0.88, facecolor=colour, edgecolor="white", linewidth=0.8)
        axes.add_patch(box)
        size = sizes[timed.step.op]
        if size >= _SMALLEST_FONT:
            axes.text(
                (timed.start + timed.end) / 2,
                timed.rank,
                str(timed.step.mb),
                ha="center",
                va="center_baseline",
                color=INK if sum(colour) > 1.75 else "white",
                fontsize=size,
            )


def _font_sizes(timeline: Timeline, inches_per_time: float) -> dict[Op, float]:
    """One font size per op, such that its longest number fits into its narrowest box."""
    digits = len(str(timeline.schedule.num_microbatches - 1))
    sizes = dict.fromkeys(Op, _LARGEST_FONT)
    for timed in timeline.steps:
        room_points = (timed.end - timed.start) * inches_per_time * _POINTS_PER_INCH
        op = timed.step.op
        sizes[op] = min(sizes[op], room_points / ((digits + 0.3) * _DIGIT_PER_FONT_SIZE))
    return sizes


def _colour(timed: TimedStep, timeline: Timeline) -> tuple[float, float, float]:
    """The op's colour; where a rank holds several stages, its later stages are paler."""
    schedule = timeline.schedule
    mine = [stage for stage, rank in enumerate(schedule.stage_to_rank) if rank == timed.rank]
    paleness = 0.5 * mine.index(timed.step.stage) / max(len(mine) - 1, 1)
    red, green, blue = (part + (1 - part) * paleness for part in to_rgb(OP_COLOURS[timed.step.op]))
    return red, green, blue


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
    for rank in ranks:
        axes.annotate(
            f"{timeline.peak_live_activations[rank]}",
            (1, rank),
            xycoords=("axes fraction", "data"),
            xytext=(34, 0),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=11,
            color=INK,
        )


def _draw_words(axes: Axes, timeline: Timeline, *, title: str) -> None:
    """Title, bubble, the heading of the right column, and the legend of the ops that occur."""
    schedule = timeline.schedule
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "color": INK, "annotation_clip": False}
    axes.annotate(title, (0, 1), xytext=(0, 27), fontsize=17, fontweight="bold", va="baseline", **place)
    stages = (
        f" · {schedule.num_stages} stages (a rank's later ones paler)"
        if schedule.num_stages != schedule.num_ranks
        else ""
    )
    facts = (
        f"{schedule.num_ranks} ranks{stages} · {schedule.num_microbatches} microbatches · "
        f"bubble {timeline.bubble_fraction:.1%} · span {timeline.span:g}"
    )
    axes.annotate(facts, (0, 1), xytext=(0, 9), fontsize=11.5, va="baseline", **place)
    axes.annotate("peak live\nactivations", (1, 1), xytext=(34, 6), fontsize=9, ha="center", va="baseline", **place)
    ops = [op for op in Op if any(timed.step.op is op for timed in timeline.steps)]
    handles = [Patch(facecolor=OP_COLOURS[op], label=OP_WORDS[op]) for op in ops]
    handles.append(Patch(facecolor=IDLE_COLOUR, label="idle"))
    axes.figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(axes.get_position().x0, 0.01),
        ncols=len(handles),
        frameon=False,
        fontsize=11,
        handlelength=1.2,
        handleheight=1.1,
        borderaxespad=0,
        borderpad=0.2,
    )
    axes.annotate("time", (1, 0), xytext=(20, -3), fontsize=9, va="top", **place)
