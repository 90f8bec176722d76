"""What a rank has waited for longest, on the host and on a device behind it, and the thread that looks at it."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron3d.comm import watcher
from megatron3d.comm.meter import Meter, Wait
from megatron3d.comm.waiting import Waiting
from megatron3d.comm.watcher import Watcher, flight_record_path, flight_record_paths, group_timeout


def test_a_wait_of_the_host_is_known_while_it_lasts() -> None:
    meter = Meter()
    with Waiting("all_gather", "tp", (2, 3), meter):
        assert str(meter.oldest_wait()) == "all_gather over tp (ranks 2, 3)"
    assert meter.oldest_wait() is None


def test_waits_of_a_device_are_known_until_it_has_passed_them() -> None:
    passed = {"all_reduce": False, "all_gather": False}
    meter = Meter()
    for name in passed:
        meter.mark = lambda name=name: lambda: passed[name]
        with Waiting(name, "dp", (0, 1), meter):
            pass
    assert str(meter.oldest_wait()) == "all_reduce over dp (ranks 0, 1)"
    with Waiting("broadcast", "world", (0, 1), meter):
        assert str(meter.oldest_wait()) == "all_reduce over dp (ranks 0, 1)", "the device is still at the first"
        passed |= dict.fromkeys(passed, True)
        assert str(meter.oldest_wait()) == "broadcast over world (ranks 0, 1)"


def test_a_failed_wait_is_what_the_rank_waits_for() -> None:
    meter = Meter(mark=lambda: lambda: True)
    with pytest.raises(ZeroDivisionError), Waiting("all_reduce", "dp", (0, 1), meter):
        raise ZeroDivisionError
    assert str(meter.oldest_wait()) == "all_reduce over dp (ranks 0, 1)"


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "POLL_S", 0.01)
    monkeypatch.setattr(watcher, "GRACE_S", 0.0)


@pytest.mark.usefixtures("prompt")
def test_the_watcher_speaks_once_of_a_wait_that_is_too_long_and_of_no_shorter_one() -> None:
    meter, heard, called = Meter(), [], threading.Event()

    def on_stuck(wait: Wait) -> None:
        heard.append(str(wait))
        called.set()

    Watcher(meter, timedelta(seconds=0.2), on_stuck)
    for _ in range(20):  # together longer than the limit
        with Waiting("all_reduce", "tp", (0, 1), meter):
            time.sleep(0.02)
    assert heard == []
    with Waiting("all_gather", "tp", (0, 1), meter):
        assert called.wait(5.0)
        time.sleep(0.1)
    assert heard == ["all_gather over tp (ranks 0, 1)"]


@pytest.mark.usefixtures("prompt")
def test_a_closed_watcher_is_silent() -> None:
    meter, heard = Meter(), []
    Watcher(meter, timedelta(seconds=0.05), heard.append).close()
    with Waiting("all_gather", "tp", (0, 1), meter):
        time.sleep(0.2)
    assert heard == []


def test_the_records_that_are_there_are_found_and_nothing_else(tmp_path: Path) -> None:
    assert flight_record_paths(tmp_path / "absent") == []
    for rank in (0, 7):
        flight_record_path(tmp_path, rank).write_text("{}")
    (tmp_path / "latest").write_text("3")
    assert flight_record_paths(tmp_path) == [flight_record_path(tmp_path, rank) for rank in (0, 7)]


def test_groups_of_nccl_outlast_the_watcher() -> None:
    limit = timedelta(minutes=3)
    assert group_timeout(limit, torch.device("cpu")) == limit
    most_s = limit.total_seconds() + watcher.GRACE_S + watcher.POLL_S
    assert group_timeout(limit, torch.device("cuda", 0)).total_seconds() > most_s + 60
