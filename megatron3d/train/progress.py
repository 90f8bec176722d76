"""What a person sees of a run: a log line now and then, and on a terminal a live bar with rate and time left.

Every line begins with its local time. The reporter takes plain numbers and clocks; it knows nothing of tensors, ranks
or files. One rank reports. Where the stream is not a terminal (a log file, a pipe) it writes plain lines without
control characters and no bar.

What the numbers of a line mean: loss, and step time, tokens and FLOP rates are taken over the steps since the last
line; terms of the loss, learning rate, gradient norm and loss scale are those of the last step. Rates count the time of
the steps alone; the time left is by the wall clock and so includes the evaluations and saves of the recent past.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, TextIO

from megatron3d.train.speed import Devices
from megatron3d.train.timestamp import local_time, stamped

if TYPE_CHECKING:
    from rich.progress import Progress

RECENT_STEPS = 100  # the time left follows changes of speed, but not every slow step
REDRAW_S = 0.1  # drawing costs milliseconds, which steps of a small model would feel


@dataclass(frozen=True)
class StepReport:
    """One training step in numbers.

    `step` is the number of steps made, from 1; `loss` the mean over the global batch; `tokens` and `flops` those of
    the whole step over all devices; `elapsed_s` the time of the step alone. `grad_norm` is None where it is not
    computed, `loss_scale` except with fp16, `memory_bytes` (the peak of one device) where it is not known. `skipped`
    says that the weights stayed as they were. `losses` has the terms of `loss` by name where there are several, and
    `expert_loads` how tokens were spread over experts, which no line shows. `layer_tokens` is given where layers drop
    tokens: how many each of the `num_layers` saw, all together.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens: int
    flops: float
    elapsed_s: float
    skipped: bool = False
    loss_scale: float | None = None
    memory_bytes: int | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    expert_loads: Mapping[str, float] = field(default_factory=dict)
    layer_tokens: int | None = None
    num_layers: int = 1


class ProgressReporter:
    """Reports the steps of one run on one stream; a context manager that takes the bar away at the end."""

    def __init__(
        self,
        total_steps: int,
        stream: TextIO,
        *,
        log_interval: int,
        devices: Devices | None = None,
        first_step: int = 0,
        skipped_before: int = 0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = local_time,
    ) -> None:
        """`devices` (default one, of unknown peak) compute each step. `first_step` counts the steps before a resume,
        `skipped_before` those of them that were skipped; `now` gives the time of a line."""
        self._total_steps = total_steps
        self._stream = stream
        self._log_interval = max(1, log_interval)
        self._devices = devices or Devices()
        self._clock, self._now = clock, now
        self._since_line: list[StepReport] = []
        self._skipped_in_all = skipped_before
        self._finished_at: deque[tuple[int, float]] = deque([(first_step, clock())], maxlen=RECENT_STEPS + 1)
        self._drawn_at = -math.inf
        self._bar = _bar(stream, total_steps, first_step) if stream.isatty() else None

    def step(self, report: StepReport) -> None:
        """Take in a step: move the bar, and write a line if it is due."""
        self._since_line.append(report)
        self._skipped_in_all += report.skipped
        self._finished_at.append((report.step, self._clock()))
        last = report.step == self._total_steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=report.step, numbers=self._bar_numbers(report))
            if last or self._clock() - self._drawn_at >= REDRAW_S:
                self._drawn_at = self._clock()
                self._bar.refresh()
        if last or report.step % self._log_interval == 0:
            self.note(self._line(report))
            self._since_line.clear()

    def evaluation(
        self,
        step: int,
        loss: float,
        *,
        name: str = "validation",
        more: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Write the line of an evaluation after `step`: `more` of what it found by name, or else the perplexity, which
        is exp(loss)."""
        perplexity = {"perplexity": math.exp(loss) if loss < 100 else math.inf}
        found = " | ".join(f"{word.replace('_', ' ')} {value:.4g}" for word, value in (more or perplexity).items())
        self.note(f"{name} after step {step} | loss {loss:.6f} | {found}")

    def note(self, text: str) -> None:
        """Write a line of any text with its time, above the bar where there is one."""
        line = stamped(text, self._now())
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> ProgressReporter:
        """The reporter itself, closed at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give the terminal back, so that an error is printed below the bar."""
        self.close()

    def seconds_left(self) -> float | None:
        """Wall-clock seconds to the last step at the pace of the recent steps; None before the first."""
        (first, began), (last, ended) = self._finished_at[0], self._finished_at[-1]
        return None if last == first else (self._total_steps - last) * (ended - began) / (last - first)

    def _line(self, last: StepReport) -> str:
        """The log line: what does not apply is left out, not shown as zero."""
        steps = self._since_line
        elapsed_s = sum(s.elapsed_s for s in steps)
        losses = [s.loss for s in steps if not s.skipped]
        parts = [
            f"step {last.step}/{self._total_steps}",
            f"loss {sum(losses) / len(losses):.6f}" if losses else "loss none (all steps skipped)",
            *(f"{word.replace('_', ' ')} {value:.4g}" for word, value in last.losses.items()),
            f"lr {last.lr:.4g}",
        ]
        if last.grad_norm is not None:
            parts.append(f"grad norm {last.grad_norm:.4g}")
        if elapsed_s > 0:
            parts += self._rates(steps, elapsed_s)
        if last.layer_tokens is not None:
            share = last.layer_tokens / (last.tokens * last.num_layers)
            parts.append(f"{format_count(last.layer_tokens)} layer tokens ({100 * share:.1f} %)")
        if last.memory_bytes is not None:
            parts.append(f"memory {format_bytes(last.memory_bytes)}")
        if last.loss_scale is not None:
            parts.append(f"loss scale {last.loss_scale:g}")
        if self._skipped_in_all:
            parts.append(f"skipped {self._skipped_in_all}")
        left_s = self.seconds_left()
        if left_s:
            parts.append(f"{format_duration(left_s)} left")
        return " | ".join(parts)

    def _rates(self, steps: list[StepReport], elapsed_s: float) -> list[str]:
        """Tokens of all devices, FLOP of each device and its share of the peak, and seconds a step."""
        flops = sum(s.flops for s in steps)
        flops_per_s, mfu = self._devices.flops_per_s(flops, elapsed_s), self._devices.mfu(flops, elapsed_s)
        parts = [f"{format_count(sum(s.tokens for s in steps) / elapsed_s)} tokens/s"]
        if flops_per_s:
            parts.append(f"{_three_digits(flops_per_s / 1e12)} TFLOP/s per device")
        if mfu is not None:
            parts.append(f"MFU {100 * mfu:.1f} %")
        return [*parts, f"{_three_digits(elapsed_s / len(steps))} s/step"]

    def _bar_numbers(self, last: StepReport) -> str:
        """The short text right of the bar."""
        from rich.markup import escape

        rate = f"{format_count(last.tokens / last.elapsed_s)} tokens/s" if last.elapsed_s > 0 else ""
        left_s = self.seconds_left()
        left = f"{format_duration(left_s)} left" if left_s else ""
        return escape("  ".join(p for p in (f"loss {last.loss:.4f}", rate, left) if p))


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: "45 s", "3 min 20 s", "2 h 13 min", "4 d 6 h"."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def format_count(number: float) -> str:
    """A count to three digits with K, M, B or T (10**3, 10**6, 10**9, 10**12): "950", "12.3K", "1.30B"."""
    return _scaled(number, 1000, ("", "K", "M", "B", "T"), "")


def format_bytes(size: float) -> str:
    """A size to three digits in powers of 1024: "512 B", "1.50 GiB"."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"), " ")


def _scaled(number: float, base: int, units: tuple[str, ...], space: str) -> str:
    """The number in the largest unit in which it is at least 1 after rounding."""
    unit = 0
    # 999.6 would be shown as 1000 of the smaller unit, so the comparison is with what rounds up.
    while abs(number) >= base - 0.5 and unit + 1 < len(units):
        number, unit = number / base, unit + 1
    text = f"{number:.0f}" if unit == 0 else _three_digits(number)
    return f"{text}{space}{units[unit]}"


def _three_digits(number: float) -> str:
    """Three significant digits without an exponent, from 0.001 up; smaller numbers as they are."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    size = abs(number)
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{number:.{decimals}f}" if size >= 0.001 else f"{number:.2g}"


def _bar(stream: TextIO, total_steps: int, first_step: int) -> Progress:
    """A started bar. It is drawn when a step ends, not by a thread, so it never competes with the training."""
    # Only a terminal needs it.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[numbers]}"),
        console=Console(file=stream),
        auto_refresh=False,
    )
    bar.add_task("training", total=total_steps, completed=first_step, numbers="")
    bar.start()
    return bar
