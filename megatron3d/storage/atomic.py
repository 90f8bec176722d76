"""Files that are there whole or not at all: written under another name, forced out, then renamed.

Every function here raises the `OSError` of the system; `refusals.storage_errors` turns it into a sentence.
"""

from __future__ import annotations

import fcntl
import glob
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

# How long a lock is waited for. Workers inherit the locks of the process that started them, and end, when that is
# killed, after `process/parent.py`'s interval or a little later.
_WAIT_S, _POLL_S = 2.0, 0.02


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. Takes the name `path` where the block ends well; is removed where it raises.

    For files that some library writes; directories above are made. What was written is on the disk before the rename.

    Raises:
        OSError: the system refused; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small UTF-8 file whole or not at all.

    Raises:
        OSError: the system refused; `path` is as it was.
    """
    with atomic_path(path) as beside, beside.open("wb") as stream:
        stream.write(text.encode())


def open_partial(path: Path) -> IO[bytes]:
    """A new file beside `path`, named by the stream's `name`, to be written and then renamed to `path`.

    The stream holds the kernel's lock on it, which ends with the last process that has it open. So what a killed run
    left beside `path` can be distinguished from what another one is writing now, and is removed here.

    Raises: OSError if the system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    while True:
        stream = open(path.with_name(f"{path.name}.{os.getpid()}.partial"), "wb")  # noqa: SIM115 (the caller closes it)
        _lock(stream)
        if os.path.exists(stream.name):
            return stream
        stream.close()  # another run took it for abandoned before it was locked


def open_resumable(path: Path) -> IO[bytes]:
    """The file `{path}.partial`, locked, with what an earlier run left in it: to be cut, written on and then renamed.

    Its name is the same in each run, so one run at a time can have it; workers of a killed run may have it for a moment
    longer than that, for which this waits. Other partial files beside `path` that nobody writes are removed.

    Raises: OSError if the system refuses; BlockingIOError, one of them, if another run has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    while True:
        name = path.with_name(f"{path.name}.partial")
        stream = open(name, "wb", opener=lambda file, flags: os.open(file, flags & ~os.O_TRUNC, 0o644))  # noqa: SIM115
        try:
            has_lock = _lock_in_time(stream, fcntl.LOCK_EX)
        except BlockingIOError:
            stream.close()
            raise
        if not has_lock or has_name(stream, name):
            return stream
        stream.close()  # the run that had it renamed or removed it before it was locked here


def is_in_use(path: Path) -> bool:
    """Whether a process holds the lock on a partial file. Raises: OSError if it cannot be opened."""
    with open(path, "rb") as stream:
        try:
            _lock_in_time(stream, fcntl.LOCK_SH)
        except BlockingIOError:
            return True
    return False


def has_name(stream: IO[bytes], name: Path) -> bool:
    """Whether an open file has this name, still."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(name))
    except FileNotFoundError:
        return False


def _remove_abandoned(path: Path) -> None:
    """Remove the partial files beside `path` that no process has locked."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with suppress(OSError), open(partial, "rb") as stream:  # gone meanwhile, or locked by its writer
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def _lock_in_time(stream: IO[bytes], kind: int) -> bool:
    """Lock a file, if need be a little later; False on a file system without locks.

    Raises: BlockingIOError if another process still has the lock then.
    """
    end_s = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end_s:
                raise
            time.sleep(_POLL_S)
        except OSError:
            return False


def _lock(stream: IO[bytes]) -> None:
    with suppress(OSError):  # a file system without locks: another run then cannot lock, and so not remove it, either
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
