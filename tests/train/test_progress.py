"""Log lines and bar, with a clock that is set by hand."""

from __future__ import annotations

import io
import math
import re
from datetime import datetime, timedelta

import pytest

from megatron3d.train.progress import ProgressReporter, StepReport, format_bytes, format_count, format_duration
from megatron3d.train.speed import Devices


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        """Starts at an arbitrary time."""
        self.now_s = 1000.0

    def __call__(self) -> float:
        """The time set."""
        return self.now_s


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """A terminal it is."""
        return True


def one_step(step: int, loss: float = 3.0, **more: float | bool | None) -> StepReport:
    """A step of 2 seconds with 1000 tokens and 4e12 FLOP."""
    numbers = {"lr": 1.5e-4, "grad_norm": 0.5, "tokens": 1000, "flops": 4e12, "elapsed_s": 2.0, **more}
    return StepReport(step, loss, **numbers)


def run_steps(reporter: ProgressReporter, clock: Clock, steps: range, wall_s: float = 2.0) -> None:
    """Report steps that take `wall_s` by the wall clock."""
    for step in steps:
        clock.now_s += wall_s
        reporter.step(one_step(step, loss=float(step)))


def test_a_line_comes_at_every_interval_and_at_the_last_step_with_the_mean_loss() -> None:
    clock, stream = Clock(), io.StringIO()
    with ProgressReporter(7, stream, log_interval=3, clock=clock) as reporter:
        run_steps(reporter, clock, range(1, 8))
    lines = stream.getvalue().splitlines()
    assert [re.search(r"\] step (\d+)/7 \| loss (\S+)", line).groups() for line in lines] == [
        ("3", "2.000000"),
        ("6", "5.000000"),
        ("7", "7.000000"),
    ]


def test_rates_follow_from_tokens_flops_devices_and_peak() -> None:
    clock, stream = Clock(), io.StringIO()
    reporter = ProgressReporter(100, stream, log_interval=2, devices=Devices(4, 1e12), clock=clock)
    clock.now_s += 3
    reporter.step(one_step(1, elapsed_s=3.0))
    clock.now_s += 1
    reporter.step(one_step(2, elapsed_s=1.0, memory_bytes=3 << 29))
    line = stream.getvalue()
    # 2000 tokens in 4 s; 8e12 FLOP in 4 s on 4 devices is 0.5 TFLOP/s each, half of the peak.
    for words in ("500 tokens/s", "0.500 TFLOP/s per device", "MFU 50.0 %", "2.00 s/step", "memory 1.50 GiB"):
        assert words in line
    assert "loss scale" not in line and "skipped" not in line


def test_time_left_counts_pauses_and_follows_the_recent_pace() -> None:
    clock = Clock()
    reporter = ProgressReporter(1000, io.StringIO(), log_interval=100, clock=clock)
    assert reporter.seconds_left() is None
    run_steps(reporter, clock, range(1, 11), wall_s=5.0)
    assert reporter.seconds_left() == pytest.approx(990 * 5.0)
    run_steps(reporter, clock, range(11, 201), wall_s=1.0)
    assert reporter.seconds_left() == pytest.approx(800 * 1.0)


def test_time_left_after_a_resume_does_not_count_the_steps_made_before() -> None:
    clock, stream = Clock(), io.StringIO()
    reporter = ProgressReporter(100, stream, log_interval=1, first_step=90, clock=clock)
    run_steps(reporter, clock, range(91, 92), wall_s=10.0)
    assert "step 91/100" in stream.getvalue() and "1 min 30 s left" in stream.getvalue()


def test_skipped_steps_and_the_loss_scale_are_told_and_kept_out_of_the_mean() -> None:
    clock, stream = Clock(), io.StringIO()
    reporter = ProgressReporter(9, stream, log_interval=2, clock=clock)
    for step, loss, skipped in ((1, math.inf, True), (2, 4.0, False), (3, math.nan, True), (4, math.nan, True)):
        clock.now_s += 1
        reporter.step(one_step(step, loss, skipped=skipped, loss_scale=65536.0))
    first, second = stream.getvalue().splitlines()
    assert "loss 4.000000" in first and "skipped 1" in first and "loss scale 65536" in first
    assert "all steps skipped" in second and "skipped 3" in second


def test_steps_skipped_before_a_resume_are_counted_on() -> None:
    clock, stream = Clock(), io.StringIO()
    reporter = ProgressReporter(9, stream, log_interval=1, first_step=6, skipped_before=2, clock=clock)
    reporter.step(one_step(7))
    reporter.step(one_step(8, skipped=True))
    assert [re.search(r"skipped \d+", line)[0] for line in stream.getvalue().splitlines()] == ["skipped 2", "skipped 3"]


def test_every_line_begins_with_the_time_at_which_it_is_written() -> None:
    clock, stream, times = Clock(), io.StringIO(), [datetime(2026, 12, 31, 23, 59, 58, 999_999)]

    def now() -> datetime:
        times.append(times[-1] + timedelta(seconds=1))
        return times[-1]

    reporter = ProgressReporter(2, stream, log_interval=1, clock=clock, now=now)
    run_steps(reporter, clock, range(1, 2))
    reporter.evaluation(1, 2.0)
    reporter.note("saved")
    assert [line[:27] for line in stream.getvalue().splitlines()] == [
        "[2026-12-31 23:59:59] step ",
        "[2027-01-01 00:00:00] valid",
        "[2027-01-01 00:00:01] saved",
    ]


def test_a_log_file_has_plain_lines_without_control_characters() -> None:
    clock, stream = Clock(), io.StringIO()
    with ProgressReporter(4, stream, log_interval=1, clock=clock) as reporter:
        run_steps(reporter, clock, range(1, 5))
        reporter.evaluation(4, 2.0)
        reporter.note("saved [bold]as it is[/]")
    text = stream.getvalue()
    assert re.fullmatch(r"[\x20-\x7e\n]*", text)
    assert "validation after step 4 | loss 2.000000 | perplexity 7.389" in text
    assert text.endswith("saved [bold]as it is[/]\n")


def test_a_terminal_shows_a_bar_with_rate_and_time_left_and_lines_above_it() -> None:
    clock, stream = Clock(), Terminal()
    with ProgressReporter(10, stream, log_interval=5, clock=clock) as reporter:
        run_steps(reporter, clock, range(1, 11))
        reporter.note("saved [bold]as it is[/]")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "step 3/10" in plain and "30 % loss 3.0000  500 tokens/s  14 s left" in plain
    assert "step 5/10 | loss 3.000000" in plain and "saved [bold]as it is[/]" in plain
    assert "\x1b[?25l" in stream.getvalue() and stream.getvalue().rstrip().endswith("\x1b[?25h")  # cursor comes back


def test_the_bar_is_not_drawn_more_often_than_an_eye_can_see() -> None:
    clock, stream = Clock(), Terminal()
    with ProgressReporter(1000, stream, log_interval=10_000, clock=clock) as reporter:
        run_steps(reporter, clock, range(1, 1001), wall_s=0.001)
    assert stream.getvalue().count("tokens/s") < 30


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7980, "2 h 13 min"),
        (86399, "1 d 0 h"),
        (4 * 86400 + 6 * 3600, "4 d 6 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999.6, "1.00K"), (12345, "12.3K"), (999_600, "1.00M"), (1.3e9, "1.30B"), (1e12, "1.00T")],
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert format_count(number) == text


def test_bytes_are_counted_in_powers_of_1024() -> None:
    assert [format_bytes(n) for n in (512, 1536, 3 << 29)] == ["512 B", "1.50 KiB", "1.50 GiB"]
