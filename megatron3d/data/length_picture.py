"""How long the documents of a token file are, as a picture: a histogram over a logarithmic axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from megatron3d.storage.atomic import atomic_path
from megatron3d.storage.refusals import storage_errors

_BAR, _MEDIAN, _INK = "#4C78A8", "#B5483A", "#333333"
_BARS_PER_OCTAVE = 4


def draw_length_histogram(lengths: NDArray[np.int64], path: Path, *, title: str) -> None:
    """Draw tokens per document into a PNG file, with the median, and the length at which half of all tokens are.

    A document without tokens has no place on the axis; how many there are stands in the heading.

    Raises: StorageError if the file cannot be written.
    """
    figure = Figure(figsize=(10, 4.5), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    some = np.sort(lengths[lengths > 0])
    num_empty = len(lengths) - len(some)
    empty = f", {num_empty:,} of them empty" if num_empty else ""
    axes.set_title(
        f"{title}\n{len(lengths):,} documents{empty}, {int(some.sum()):,} tokens", loc="left", fontsize=11, color=_INK
    )
    if len(some):
        _draw_bars(axes, some)
        _mark(axes, float(np.median(some)), "median document", "-")
        half = int(np.searchsorted(np.cumsum(some), some.sum() / 2))
        _mark(axes, float(some[half]), "half of all tokens: documents up to", "--")
        axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with storage_errors("write the picture", path, way_out="choose another --histogram file"), atomic_path(path) as to:
        figure.savefig(to, dpi=160, format="png")


def length_bars(lengths: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Edges that rise by quarters of a power of 2 (whole numbers, each once), and how many lengths lie between them."""
    first, last = np.floor(np.log2(lengths.min())), np.floor(np.log2(lengths.max())) + 1
    edges = np.unique(np.ceil(2 ** np.arange(first, last + 1 / 8, 1 / _BARS_PER_OCTAVE)))
    return edges, np.histogram(lengths, edges)[0]


def _draw_bars(axes: Axes, lengths: NDArray[np.int64]) -> None:
    edges, counts = length_bars(lengths)
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=_BAR, edgecolor="white", linewidth=0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0] / 1.1, edges[-1] * 1.1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _mark(axes: Axes, length: float, name: str, style: str) -> None:
    axes.axvline(length, color=_MEDIAN, linestyle=style, linewidth=1.5, label=f"{name}: {length:,.0f}")
