"""Held-out losses of several models over tokens and over operations, each from several seeds, and their picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

COLORS = ("#6b6b6b", "#c8501e", "#1f5fa8", "#3c8a3c", "#8a4fa8")
TEXT_COLOR = "#222222"


@dataclass(frozen=True)
class Curve:
    """The losses of one model.

    Attributes:
        name: of the model.
        tokens: that a run had seen at each evaluation, ascending.
        losses: of each seed, at each of these.
        flops_per_token: operations of forward and backward.
        flops_at: at each evaluation, where they are not the same for every token.
    """

    name: str
    tokens: Sequence[int]
    losses: Sequence[Sequence[float]]
    flops_per_token: float
    flops_at: Sequence[float] | None = None

    @cached_property
    def mean(self) -> list[float]:
        """Over the seeds."""
        return [statistics.mean(of_seeds) for of_seeds in zip(*self.losses, strict=True)]

    @property
    def operations(self) -> Sequence[float]:
        """At each evaluation."""
        return [tokens * self.flops_per_token for tokens in self.tokens] if self.flops_at is None else self.flops_at

    @property
    def flops(self) -> float:
        """Of one run."""
        return self.operations[-1]

    def tokens_to(self, loss: float) -> float | None:
        """After how many tokens the mean is `loss` for the first time, by straight lines between evaluations; None if
        it stays above. What is reached before the first evaluation counts as reached there."""
        points = list(zip(self.tokens, self.mean, strict=True))
        if points[0][1] <= loss:
            return points[0][0]
        for (tokens, before), (next_tokens, after) in pairwise(points):
            if after <= loss:
                return tokens + (next_tokens - tokens) * (before - loss) / (before - after)
        return None


def plot_curves(curves: Sequence[Curve], path: Path) -> None:
    """Draw the means bold and the seeds thin, over tokens and over operations, into a PNG of 1920 x 960 pixels.

    At most five curves, as there are colours."""
    figure = Figure(figsize=(9.6, 4.8), dpi=200, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for curve, color in zip(curves, COLORS, strict=False):
        _draw(left, curve, [tokens / 1e6 for tokens in curve.tokens], color)
        _draw(right, curve, [flops / 1e12 for flops in curve.operations], color)
    left.set_xlabel("tokens (millions)", color=TEXT_COLOR)
    left.set_ylabel("held-out loss (nats per token)", color=TEXT_COLOR)
    right.set_xlabel("operations (TFLOP, logarithmic)", color=TEXT_COLOR)
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    right.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    right.xaxis.set_minor_formatter(NullFormatter())
    left.set_ylim(top=curves[0].mean[min(1, len(curves[0].mean) - 1)])  # the first fall is the same for all
    for axes in (left, right):
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, loc="lower left", labelcolor=TEXT_COLOR, edgecolor="none")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw(axes: Axes, curve: Curve, xs: Sequence[float], color: str) -> None:
    for losses in curve.losses:
        axes.plot(xs, losses, color=color, linewidth=0.6, alpha=0.5)
    axes.plot(xs, curve.mean, color=color, linewidth=2, label=f"{curve.name}, last {curve.mean[-1]:.3f}")
