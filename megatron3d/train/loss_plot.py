"""A picture of a run's losses, made from its metrics file and good enough to show.

The raw training loss is drawn thin, its moving mean bold, the validation loss as points; the title says how large the
model is and how it was cut. Where evaluations measured accuracies (a BERT's), a panel below shows them beside the
unigram baseline, which is what the best constant answer would reach; where layers have experts, one shows how much
fuller than the mean the fullest of each layer is. Steps whose loss was not finite or whose update was skipped are left
out of the curves and marked at the bottom edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from megatron3d.errors import DataError
from megatron3d.storage.refusals import storage_errors
from megatron3d.train.metrics import read_records
from megatron3d.train.progress import format_count

TRAIN_COLOR = "#1f5fa8"
VALID_COLOR = "#c8501e"
TEXT_COLOR = "#222222"
MUTED_COLOR = "#6b6b6b"
SMOOTHING_SHARE = 0.03  # the moving mean covers about this share of the run
AXIS_QUANTILE = 0.995  # the few losses above it leave the picture if they would flatten the rest
MOST_LAYERS_IN_LEGEND = 8


def plot_losses(metrics_path: str | Path, png_path: str | Path) -> None:
    """Draw the losses of a metrics file into a PNG of 1920 x 1080 pixels.

    Raises: DataError if the file is missing, damaged, or has no finite training loss; StorageError if the picture
    cannot be written.
    """
    try:
        records = read_records(metrics_path)
    except OSError as error:
        raise DataError(f"Metrics file {metrics_path} cannot be read: {error.strerror or error}.") from error
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None and not r.get("skipped")]
    valid = [(r["step"], r["valid_loss"]) for r in records if r.get("valid_loss") is not None]
    left_out = [r["step"] for r in records if "loss" in r and (r["loss"] is None or r.get("skipped"))]
    if not train:
        raise DataError(f"Metrics file {metrics_path} has no finite training loss to draw; has the run made a step?")
    start = next((r for r in records if r.get("event") == "start"), {})

    margins = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)  # inches
    figure = Figure(figsize=(9.6, 5.4), dpi=200, layout=margins)
    FigureCanvasAgg(figure)
    panels: list[Callable[[Axes], None]] = []
    if accuracies := accuracy_curves(records):
        panels.append(lambda panel: _draw_accuracies(panel, accuracies))
    if loads := load_curves(records):
        panels.append(lambda panel: _draw_loads(panel, loads))
    axes, *below = figure.subplots(1 + len(panels), 1, sharex=True, squeeze=False).flatten()
    _draw_train(axes, train)
    _draw_valid(axes, valid)
    _mark_left_out(axes, left_out)
    _decorate(axes, start, [*train, *valid])
    for panel, draw in zip(below, panels, strict=True):
        draw(panel)
    for above in (axes, *below)[:-1]:
        above.set_xlabel("")
    _save(figure, Path(png_path))


def smoothed(losses: list[float], half_width: int) -> list[float]:
    """Mean over up to `half_width` steps to either side, so that the curve does not lag behind the losses.

    Near the start the window reaches a fifth of the way back, as the first losses fall too fast for a wider one; near
    the end it has only its left side.
    """
    sums = [0.0, *accumulate(losses)]
    means = []
    for i in range(len(losses)):
        reach = min(half_width, i // 5)
        first, end = i - reach, min(i + reach + 1, len(losses))
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def accuracy_curves(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, share) of each accuracy in the records of evaluations, by its name without `valid_` and `_accuracy`."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, share in record.items():
            if name.startswith("valid_") and name.endswith("_accuracy") and share is not None:
                short = name.removeprefix("valid_").removesuffix("_accuracy")
                curves.setdefault(short, []).append((record["step"], share))
    return curves


def load_curves(records: list[dict[str, Any]]) -> dict[int, list[tuple[int, float]]]:
    """(step, tokens of the fullest expert over the mean) of each layer with experts, by its number."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for record in records:
        for name, load in record.items():
            if name.startswith("expert_load/layer_") and load is not None:
                curves.setdefault(int(name.rpartition("_")[2]), []).append((record["step"], load))
    return curves


def _draw_accuracies(axes: Axes, curves: Mapping[str, list[tuple[int, float]]]) -> None:
    """Each accuracy as a line with points; the baseline, which nothing was learnt for, dashed and grey."""
    colors = iter((VALID_COLOR, TRAIN_COLOR, TEXT_COLOR))
    for name, curve in curves.items():
        steps, shares = zip(*curve, strict=True)
        is_baseline = name == "unigram"
        style: dict[str, Any] = {"color": MUTED_COLOR, "linestyle": "--"}
        if not is_baseline:
            style = {"color": next(colors), "marker": "o"}
        label = f"{name}{' baseline' if is_baseline else ''}, last {shares[-1]:.1%}"
        axes.plot(steps, shares, linewidth=1.4, markersize=4, label=label, **style)
    axes.set_ylim(bottom=0.0)
    axes.legend(fontsize=10, loc="best", labelcolor=TEXT_COLOR, edgecolor="none", framealpha=0.9)
    _decorate_panel(axes, "validation accuracy")


def _draw_loads(axes: Axes, curves: Mapping[int, list[tuple[int, float]]]) -> None:
    """The moving mean of each layer, dark for the last; an even load is the line at 1."""
    shades = colormaps["viridis_r"]
    for place, (layer, curve) in enumerate(sorted(curves.items())):
        steps, loads = [step for step, _ in curve], [load for _, load in curve]
        means = smoothed(loads, round(SMOOTHING_SHARE * len(loads) / 2))
        axes.plot(steps, means, color=shades((place + 1) / len(curves)), linewidth=1.4, label=f"layer {layer}")
    axes.axhline(1.0, color=MUTED_COLOR, linewidth=0.8, linestyle="--")
    if len(curves) <= MOST_LAYERS_IN_LEGEND:
        axes.legend(fontsize=10, loc="best", ncols=2, labelcolor=TEXT_COLOR, edgecolor="none", framealpha=0.9)
    _decorate_panel(axes, "fullest expert\nover the mean")


def _decorate_panel(axes: Axes, label: str) -> None:
    axes.set_xlabel("step", fontsize=11, color=TEXT_COLOR)
    axes.set_ylabel(label, fontsize=11, color=TEXT_COLOR)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED_COLOR, labelsize=10)


def _draw_train(axes: Axes, train: list[tuple[int, float]]) -> None:
    """The raw loss thin and its moving mean bold; in a short run the raw loss alone."""
    steps, losses = [s for s, _ in train], [v for _, v in train]
    half_width = round(SMOOTHING_SHARE * len(losses) / 2)
    if half_width < 1:
        axes.plot(steps, losses, color=TRAIN_COLOR, linewidth=2, label=f"training, last {losses[-1]:.3f}")
        return
    means = smoothed(losses, half_width)
    axes.plot(steps, losses, color=TRAIN_COLOR, linewidth=0.6, alpha=0.4, label="training, each step")
    label = f"training, mean of {2 * half_width + 1} steps, last {means[-1]:.3f}"
    axes.plot(steps, means, color=TRAIN_COLOR, linewidth=2.2, label=label)


def _draw_valid(axes: Axes, valid: list[tuple[int, float]]) -> None:
    """The validation loss as a line with a point for each evaluation, few enough to be distinguished."""
    if not valid:
        return
    steps, losses = [s for s, _ in valid], [v for _, v in valid]
    axes.plot(
        steps,
        losses,
        color=VALID_COLOR,
        linewidth=1.4,
        marker="o",
        markersize=5,
        markeredgecolor="white",
        markevery=max(1, math.ceil(len(valid) / 40)),
        zorder=3,
        label=f"validation, last {losses[-1]:.3f}",
    )


def _mark_left_out(axes: Axes, steps: list[int]) -> None:
    """Small crosses at the bottom edge for steps without a loss to draw."""
    if steps:
        axes.plot(
            steps,
            [0.012] * len(steps),
            transform=axes.get_xaxis_transform(),
            linestyle="none",
            marker="x",
            markersize=4,
            color=MUTED_COLOR,
            label=f"skipped or not finite ({len(steps)})",
        )


def _decorate(axes: Axes, start: Mapping[str, Any], points: list[tuple[int, float]]) -> None:
    """Title, labels, limits, grid and legend."""
    title, subtitle = _titles(start)
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", color=TEXT_COLOR, pad=26 if subtitle else 12)
    if subtitle:
        axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=10.5, color=MUTED_COLOR)
    axes.set_xlabel("step", fontsize=11, color=TEXT_COLOR)
    axes.set_ylabel("loss (nats per token)", fontsize=11, color=TEXT_COLOR)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    last = max(step for step, _ in points)
    axes.set_xlim(min(step for step, _ in points) - 0.01 * last, 1.01 * last)
    axes.set_ylim(*_limits([loss for _, loss in points]))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED_COLOR, labelsize=10)
    axes.legend(fontsize=10, loc="upper right", labelcolor=TEXT_COLOR, edgecolor="none", framealpha=0.9)


def _limits(losses: list[float]) -> tuple[float, float]:
    """Limits that show all losses, except very few that lie so high that they would flatten the rest."""
    ordered = sorted(losses)
    low, high, most = ordered[0], ordered[-1], ordered[math.ceil(AXIS_QUANTILE * len(ordered)) - 1]
    if high - low > 2.0 * (most - low) > 0:
        high = most
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _titles(start: Mapping[str, Any]) -> tuple[str, str]:
    """ "GPT, 12.3M parameters" and "TP 2 x PP 2 x DP 1, schedule 1f1b" from the start record, as far as it says."""
    title = f"Loss of {start.get('model', 'the run')}"
    if "parameters" in start:
        title += f", {format_count(start['parameters'])} parameters"
    layout = start.get("layout", {})
    degrees = " \u00d7 ".join(f"{name.upper()} {degree}" for name, degree in layout.items() if name != "zero")
    parts = [degrees] if degrees else []
    if "zero" in layout:
        parts.append(f"ZeRO {layout['zero']}")
    if "schedule" in start:
        parts.append(f"schedule {start['schedule']}")
    return title, "   \u00b7   ".join(parts)


def _save(figure: Figure, path: Path) -> None:
    """Write the PNG."""
    with storage_errors("write the loss curve", path, way_out="name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
