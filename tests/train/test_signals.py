"""Stopping on request, in this process and in real ones that are killed from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from megatron3d.train.signals import StopFlag

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 20.0  # far more than any wait takes; only a failure waits this long


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_signal_sets_the_flag_and_says_which(number: signal.Signals) -> None:
    with StopFlag() as stop:
        assert not stop and stop.signal_name == ""
        os.kill(os.getpid(), number)
        assert stop.wait(LONG_S)
        assert stop and stop.signal_name == number.name


def test_handlers_and_threads_are_as_before_afterwards() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    seen: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    before = [signal.getsignal(n) for n in numbers]
    threads = threading.active_count()
    try:
        with pytest.raises(RuntimeError, match="from the block"), StopFlag():
            assert [signal.getsignal(n) for n in numbers] != before
            raise RuntimeError("from the block")
        assert [signal.getsignal(n) for n in numbers] == before
        assert threading.active_count() == threads
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_a_hangup_that_is_ignored_as_by_nohup_stays_ignored() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wait(0.1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_stop_ends_a_run_that_starts_and_only_sets_the_flag_of_one_that_defers() -> None:
    for defers in (False, True):
        ended: list[str] = []
        with StopFlag(on_early=ended.append) as stop:
            if defers:
                stop.defer()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.wait(LONG_S) and stop.reason == "SIGUSR1 was received"
        assert ended == ([] if defers else ["SIGUSR1 was received"])


def test_a_request_is_refused_where_no_signal_is_handled_and_never_forces_the_end() -> None:
    assert not StopFlag().request("nobody listens")
    with StopFlag(relay_window_s=0.0, on_forced=lambda code: None) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(LONG_S)
        assert stop.request("the agent is gone")
        time.sleep(0.05)  # a forced end would come now
        assert stop.reason == "SIGTERM was received"


def test_the_same_signal_relayed_by_a_launcher_does_not_force_the_end() -> None:
    with StopFlag(relay_window_s=LONG_S) as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.wait(LONG_S)
        time.sleep(0.05)  # a forced end would come now
        assert stop.signal_name == "SIGINT"


def test_two_flags_of_one_process_know_nothing_of_each_other() -> None:
    with StopFlag() as first:
        os.kill(os.getpid(), signal.SIGTERM)
        assert first.wait(LONG_S)
    with StopFlag() as second:
        assert first and not second


BODY = """
    import sys, time
    from megatron3d.train.signals import StopFlag
    with StopFlag(relay_window_s=float(sys.argv[1]), on_forced=lambda code: print("forced", code, flush=True)) as stop:
        print("ready", flush=True)
        assert stop.wait(20)
        print("stopping", stop.signal_name, flush=True)
        {busy}
    print("saved", flush=True)
    sys.exit(75)
"""


def start(busy: str, relay_window_s: float) -> subprocess.Popen[str]:
    """A process that is stopping and busy."""
    code = textwrap.dedent(BODY).format(busy=busy)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(relay_window_s)], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_process_whose_main_thread_is_stuck(number: signal.Signals, code: int) -> None:
    # Blocking the signals in the main thread keeps Python's handlers from running, as a stuck collective does.
    stuck = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT]); time.sleep(20)"
    process = start(stuck, relay_window_s=0.0)
    process.send_signal(number)
    assert process.stdout.readline() == f"stopping {number.name}\n"
    process.send_signal(number)
    rest, _ = process.communicate(timeout=LONG_S)
    assert rest == f"forced {code}\n"
    assert process.returncode == code


def test_the_signal_at_the_limit_does_not_kill_the_save_the_warning_began() -> None:
    process = start("time.sleep(0.5)", relay_window_s=0.0)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "stopping SIGUSR1\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=LONG_S)
    assert rest == "saved\n"
    assert process.returncode == 75
