"""Why a run ended, as an exit code and as a file: a launcher such as torchrun hides the codes of its workers.

`exit_status.json` lies beside the checkpoints and holds code, reason, rank, step and time. When one rank fails, the
others fail soon after because it is gone; the file keeps the first cause, not those echoes.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron3d.errors import Megatron3dError, PeerError, StorageError
from megatron3d.files.fields import Fields
from megatron3d.files.json_text import is_whole_number, parse_object
from megatron3d.storage.durable import flush_to_disk

FILE_NAME = "exit_status.json"
STORAGE_ERRNOS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


@dataclass(frozen=True)
class ExitStatus:
    """How one rank ended; `step` is the last step it finished, `time` the seconds since 1970."""

    code: int
    reason: str
    rank: int
    step: int
    time: float


def exit_code_of(error: BaseException | None) -> int:
    """The process exit code for what ended the run; 0 if nothing did, 1 for what no user is expected to meet.

    A write refused by a full or read-only file system is a storage error wherever it came from.
    """
    if error is None:
        return 0
    if isinstance(error, Megatron3dError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        return StorageError.exit_code
    return 1


def status_of(error: BaseException | None, *, rank: int, step: int) -> ExitStatus:
    """The status to write for what ended the run, now."""
    reason = "done" if error is None else f"{type(error).__name__}: {error}"
    return ExitStatus(exit_code_of(error), reason, rank, step, time.time())


def saved_step(directory: str | Path) -> int:
    """The step of the latest checkpoint in a --save directory, by its name alone; 0 where there is none.

    It is where a run stands that ends before it has read its checkpoint, or because it cannot.
    """
    try:
        name = (Path(directory) / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return 0
    digits = name.removeprefix("iter_")
    return int(digits) if digits.isdecimal() else 0


def clear_exit_status(directory: str | Path) -> int | None:
    """Remove the file of an earlier run; one rank calls this at the start, before another can write.

    Returns the last step that the earlier run finished; None where no file says it.

    Raises: StorageError if it is there and cannot be removed, as no checkpoint could be written there either.
    """
    path = Path(directory) / FILE_NAME
    step = _step_in(path)
    remove_of_earlier_run(path)
    return step


def remove_of_earlier_run(path: Path) -> None:
    """Remove a file of how an earlier run ended, which is no answer to how this one ends.

    Raises: StorageError if it is there and cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path} of an earlier run cannot be removed: {error.strerror}; make --save writable or name another."
        ) from error


def _step_in(path: Path) -> int | None:
    try:
        return Fields(parse_object(path.read_bytes()), FILE_NAME).integer("step")
    except (OSError, ValueError):
        return None


def write_exit_status(directory: str | Path, status: ExitStatus) -> str | None:
    """Write the file in one step, unless this rank only failed because of another one that has written already.

    This runs while an error is on its way to the user and must not hide it: where the file system refuses, nothing is
    raised, and the sentence that says why is returned for the log.
    """
    path = Path(directory) / FILE_NAME
    if status.code == PeerError.exit_code and _names_a_cause(path):
        return None
    beside = path.with_name(f".{FILE_NAME}.{status.rank}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(status)) + "\n")
            flush_to_disk(file)
        if status.code == PeerError.exit_code:
            _place_unless_a_cause_is_there(beside, path)
        else:
            os.replace(beside, path)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror or error}; the run ended with code {status.code}."
    return None


def _place_unless_a_cause_is_there(beside: Path, path: Path) -> None:
    """Give the file its name, but for a cause that another rank writes at the same moment: a link never replaces."""
    try:
        os.link(beside, path)
    except FileExistsError:
        if not _names_a_cause(path):
            os.replace(beside, path)
    except OSError:  # a file system without links
        os.replace(beside, path)
    beside.unlink(missing_ok=True)


def _names_a_cause(path: Path) -> bool:
    """Whether the file is there and reports an earlier failure; of several lost peers the first is kept."""
    try:
        code = parse_object(path.read_bytes()).get("code")
    except (OSError, ValueError):
        return False  # absent or damaged: then this status is the better one
    return is_whole_number(code, 1)
