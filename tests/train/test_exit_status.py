"""Exit codes and the file that keeps them past the launcher."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from megatron3d.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InUseError,
    NumericsError,
    PeerError,
    ScheduleError,
    StopRequested,
    StorageError,
)
from megatron3d.train.exit_status import (
    FILE_NAME,
    ExitStatus,
    clear_exit_status,
    exit_code_of,
    status_of,
    write_exit_status,
)
from tests.files.mutations import mutated_bytes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ConfigError(""), 2),
        (ScheduleError(""), 2),
        (DataError(""), 3),
        (CheckpointError(""), 4),
        (NumericsError(""), 5),
        (PeerError(""), 6),
        (StorageError(""), 7),
        (InUseError(""), 8),
        (StopRequested(""), 75),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "full"), 7),
        (OSError(errno.EROFS, "read-only"), 7),
        (OSError(errno.ENOENT, "absent"), 1),
        (SystemExit(2), 2),
        (SystemExit(), 0),
        (SystemExit("words"), 1),
        (RuntimeError(""), 1),
    ],
)
def test_every_end_has_the_code_of_the_contract(error: BaseException | None, code: int) -> None:
    assert exit_code_of(error) == code


def test_the_file_tells_code_reason_rank_step_and_time(tmp_path: Path) -> None:
    status = status_of(DataError("A.bin is truncated."), rank=3, step=17)
    assert write_exit_status(tmp_path / "new", status) is None
    status = json.loads((tmp_path / "new" / FILE_NAME).read_text())
    assert abs(status.pop("time") - time.time()) < 60
    assert status == {"code": 3, "reason": "DataError: A.bin is truncated.", "rank": 3, "step": 17}
    assert os.listdir(tmp_path / "new") == [FILE_NAME]


def code_told(directory: Path) -> int:
    """The code in the file."""
    return json.loads((directory / FILE_NAME).read_text())["code"]


def test_the_rank_that_caused_the_end_is_not_overwritten_by_those_that_lost_it(tmp_path: Path) -> None:
    lost, cause = (
        status_of(e, rank=r, step=5) for r, e in ((0, PeerError("rank 1 is gone")), (1, NumericsError("nan")))
    )
    write_exit_status(tmp_path, lost)
    assert code_told(tmp_path) == 6
    write_exit_status(tmp_path, cause)
    assert code_told(tmp_path) == 5
    write_exit_status(tmp_path, lost)
    assert code_told(tmp_path) == 5


def test_a_cause_that_is_written_at_the_same_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost, cause = (
        status_of(e, rank=r, step=5) for r, e in ((0, PeerError("rank 1 is gone")), (1, NumericsError("nan")))
    )
    sync, raced = os.fsync, []

    def sync_while_the_cause_is_written(fd: int) -> None:
        sync(fd)
        if not raced:
            raced.append(True)
            write_exit_status(tmp_path, cause)

    monkeypatch.setattr(os, "fsync", sync_while_the_cause_is_written)
    write_exit_status(tmp_path, lost)
    assert raced and code_told(tmp_path) == 5
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_a_peer_error_replaces_a_success_or_a_damaged_file(tmp_path: Path) -> None:
    lost = status_of(PeerError("rank 1 is gone"), rank=0, step=5)
    for before in (json.dumps({"code": 0}), "{", "[]"):
        (tmp_path / FILE_NAME).write_text(before)
        write_exit_status(tmp_path, lost)
        assert code_told(tmp_path) == 6


def test_clearing_makes_way_for_a_new_run_and_needs_no_file(tmp_path: Path) -> None:
    write_exit_status(tmp_path, status_of(NumericsError("nan"), rank=0, step=5))
    clear_exit_status(tmp_path)
    clear_exit_status(tmp_path)
    clear_exit_status(tmp_path / "absent")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_does_not_hide_the_error_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / FILE_NAME).write_text("before")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    status = ExitStatus(5, "NumericsError: nan", 0, 3, 0.0)
    with pytest.raises(NumericsError, match="the first error"):
        try:
            raise NumericsError("the first error")
        finally:
            said = write_exit_status(tmp_path, status)
    assert os.strerror(code) in said and "code 5" in said
    assert (tmp_path / FILE_NAME).read_text() == "before"


def test_a_path_that_cannot_be_a_directory_is_told_not_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = write_exit_status(tmp_path / "file" / "below", ExitStatus(0, "done", 0, 1, 0.0))
    assert said is not None and "cannot be written" in said


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=mutated_bytes({"code": 5, "reason": "NumericsError: x", "rank": 1, "step": 3, "time": 1.5}))
def test_a_changed_status_file_hinders_no_later_one(tmp_path: Path, data: bytes) -> None:
    """A lost peer's status gives way to a cause that stands there, and to nothing else, in whichever state it is."""
    (tmp_path / FILE_NAME).write_bytes(data)
    assert write_exit_status(tmp_path, status_of(PeerError("gone"), rank=0, step=3)) is None
    now = (tmp_path / FILE_NAME).read_bytes()
    code = json.loads(now.decode("utf-8-sig"))["code"]
    assert type(code) is int and code > 0 and (now == data or code == PeerError.exit_code)
