"""Several orders side by side as one picture: each timeline to the same scale of time, with bars for the numbers."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron3d.pipeline.draw.compare import ComparedOrder, Comparison, comparison_headline
from megatron3d.pipeline.draw.png import (
    IDLE_COLOUR,
    INK,
    legend_of_ops,
    ops_of,
    stages_per_rank,
    timeline_rows,
    write_figure,
)
from megatron3d.pipeline.schedule import Op

_BUBBLE_COLOUR, _MEMORY_COLOUR = "#B5483A", "#6C5B9E"
_WIDTH_INCHES, _NAMES_INCHES, _BAR_INCHES, _GAP_INCHES = 9.6, 1.55, 1.35, 0.35
_TOP_INCHES, _BOTTOM_INCHES = 1.12, 0.55
_BLOCK_LIMITS_INCHES, _ROW_INCHES, _BETWEEN_INCHES = (0.5, 1.3), 0.14, 0.17


def draw_comparison_png(comparison: Comparison, path: Path, *, title: str | None = None) -> None:
    """Draw one block per order, in the order of the comparison, into a PNG file.

    Raises:
        StorageError: if the file cannot be written.
    """
    contenders = comparison.contenders
    lowest, highest = _BLOCK_LIMITS_INCHES
    block = min(max(comparison.num_ranks * _ROW_INCHES, lowest), highest)
    body = len(contenders) * (block + _BETWEEN_INCHES)
    width = _NAMES_INCHES + _WIDTH_INCHES + 2 * (_GAP_INCHES + _BAR_INCHES) + 0.25
    height = _TOP_INCHES + body + _BOTTOM_INCHES
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    longest = max(contender.timeline.span for contender in contenders)
    columns = _columns(figure, width=width, height=height, body=body)
    rows_per_block = comparison.num_ranks * (1 + _BETWEEN_INCHES / block)
    for number, contender in enumerate(contenders):
        first_row = number * rows_per_block
        timeline_rows(columns[0], contender.timeline, inches_per_time=_WIDTH_INCHES / longest, first_row=first_row)
        _name(columns[0], contender, at=first_row + (comparison.num_ranks - 1) / 2)
    for axes in columns:
        axes.set_ylim(len(contenders) * rows_per_block - 0.5, -0.5)
    columns[0].set_xlim(0, longest)
    middles = [number * rows_per_block + (comparison.num_ranks - 1) / 2 for number in range(len(contenders))]
    bubbles = [100 * contender.timeline.bubble_fraction for contender in contenders]
    peaks = [max(contender.peaks) for contender in contenders]
    _bars(columns[1], middles, bubbles, colour=_BUBBLE_COLOUR, words=[f"{bubble:.1f}%" for bubble in bubbles])
    _bars(columns[2], middles, peaks, colour=_MEMORY_COLOUR, words=[f"{peak:.3g}" for peak in peaks])
    _headings(columns, comparison, title)
    ops = [op for op in Op if any(op in ops_of(contender.timeline) for contender in contenders)]
    shades = max(stages_per_rank(contender.timeline) for contender in contenders)
    legend_of_ops(figure, ops, stages_per_rank=shades, left=_NAMES_INCHES / width, bottom=0.1 / height)
    write_figure(figure, path)


def _columns(figure: Figure, *, width: float, height: float, body: float) -> list[Axes]:
    """Axes for the timelines, the bubbles and the activations, without frames."""
    bars = _NAMES_INCHES + _WIDTH_INCHES + _GAP_INCHES
    places = [(_NAMES_INCHES, _WIDTH_INCHES), (bars, _BAR_INCHES), (bars + _BAR_INCHES + _GAP_INCHES, _BAR_INCHES)]
    columns = []
    for left, wide in places:
        axes = figure.add_axes((left / width, _BOTTOM_INCHES / height, wide / width, body / height))
        axes.set_axis_off()
        columns.append(axes)
    return columns


def _name(axes: Axes, contender: ComparedOrder, *, at: float) -> None:
    """The order's name left of its timeline, with its stages per rank where they are several."""
    several = contender.stages_per_rank > 1
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "color": INK}
    axes.annotate(
        contender.name, (0, at), xytext=(-10, 3 if several else 0), va="bottom" if several else "center",
        fontsize=11.5, fontweight="bold", **place,
    )  # fmt: skip
    if several:
        words = f"{contender.stages_per_rank} stages per rank"
        axes.annotate(words, (0, at), xytext=(-10, -1), va="top", fontsize=8.5, **place)
    span = f"{contender.timeline.span:.4g}"
    axes.annotate(
        span, (contender.timeline.span, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5,
        color=INK, annotation_clip=False,
    )  # fmt: skip


def _bars(axes: Axes, middles: list[float], values: list[float], *, colour: str, words: list[str]) -> None:
    """Horizontal bars on a common scale, each with its number."""
    thickness = 0.36 * (middles[1] - middles[0]) if len(middles) > 1 else 0.5
    scale = 1.45 * max(*values, 1e-9)
    axes.set_xlim(0, scale)
    for middle, value, word in zip(middles, values, words):
        axes.add_patch(Rectangle((0, middle - thickness / 2), scale / 1.45, thickness, facecolor=IDLE_COLOUR))
        axes.add_patch(Rectangle((0, middle - thickness / 2), value, thickness, facecolor=colour))
        axes.annotate(
            word, (scale / 1.45, middle), xytext=(5, 0), textcoords="offset points", va="center", fontsize=11,
            color=INK, annotation_clip=False,
        )  # fmt: skip


def _headings(columns: list[Axes], comparison: Comparison, title: str | None) -> None:
    """Title and sizes above the timelines, and what the bars are."""
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "color": INK, "annotation_clip": False}
    timelines, bubbles, peaks = columns
    heading = title or "Pipeline schedules compared"
    timelines.annotate(heading, (0, 1), xytext=(0, 44), fontsize=17, fontweight="bold", va="baseline", **place)
    several = any(contender.stages_per_rank > 1 for contender in comparison.contenders)
    facts = f"{comparison_headline(comparison)}, the same work in each; the number behind a timeline is its span"
    facts += "; a rank's later stages are paler" if several else ""
    timelines.annotate(facts, (0, 1), xytext=(0, 25), fontsize=11.5, va="baseline", **place)
    bubbles.annotate("bubble", (0, 1), xytext=(0, 8), fontsize=11, va="baseline", **place)
    peaks.annotate("peak live activations,\nmicrobatches per rank", (0, 1), xytext=(0, 8), fontsize=9, **place)
