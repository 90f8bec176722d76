"""Standard streams that cannot end a run: a closed pipe, a full disk behind a log or a terminal that is gone.

`python pretrain_gpt.py ... | head -1` closes the pipe after one line; what is written later is dropped, which the
other stream reports once. A stream that is closed from the start (`>&-`) becomes the null device, since otherwise the
next file that the process opens, perhaps a checkpoint, would get its number and with it everything that libraries
print.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO, errno.ECONNRESET)  # the reader will not come back
_NAMES = {1: "standard output", 2: "standard error"}


class PatientFile(io.FileIO):
    """A file descriptor to write to: what the system refuses is counted instead of raised, and reported once."""

    def __init__(self, fd: int, report: Callable[[str], None]) -> None:
        """Write to `fd`, which stays open; `report` takes the sentence about the first refusal."""
        super().__init__(fd, "w", closefd=False)
        self.lost_bytes = 0
        self._report = report
        self._is_gone = False

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        """Write all of `data` and return its size, also where the system refuses a part, which is then lost."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and not self._is_gone:
                written = super().write(rest)
                if written is None:  # a pipe without blocking that is full: wait, as writers elsewhere do
                    select.select([], [self.fileno()], [])
                rest = rest[written or 0 :]
        except OSError as error:
            self._is_gone = error.errno in _GONE
            if not self.lost_bytes:
                name = _NAMES.get(self.fileno(), f"descriptor {self.fileno()}")
                self._report(f"warning: {name} cannot be written ({error.strerror}); the run continues without it")
        self.lost_bytes += len(rest)
        return size


@contextmanager
def patient_streams() -> Iterator[None]:
    """Replace sys.stdout and sys.stderr by streams that never raise, until the process ends.

    Streams that something else has replaced already (a test, a notebook) are left alone. The block's end reports how
    much of the output was lost; the streams stay, because Python writes to them until its last moment.
    """
    _open_closed_descriptors()
    files = [_replace("stdout", 1), _replace("stderr", 2)]
    try:
        yield
    finally:
        for file in files:
            if file is not None and file.lost_bytes:
                _report_elsewhere(file.fileno(), f"{_NAMES[file.fileno()]}: {file.lost_bytes:,} bytes were lost")


def lost_bytes(stream: TextIO) -> int:
    """How much of what was written to a stream the system has refused; 0 for a stream that is not a patient one."""
    if not isinstance(stream, io.TextIOWrapper):
        return 0
    buffer = stream.buffer
    file = buffer.raw if isinstance(buffer, io.BufferedWriter) else buffer
    return file.lost_bytes if isinstance(file, PatientFile) else 0


def _open_closed_descriptors() -> None:
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is fd: those below are open
            assert opened == fd, f"descriptor {fd} was closed and the null device became {opened}"
            os.set_inheritable(fd, True)


def _replace(name: str, fd: int) -> PatientFile | None:
    """Put a patient stream in the place of sys.`name`; None where that is not Python's own any more."""
    current: TextIO | None = sys.stdout if name == "stdout" else sys.stderr
    own: TextIO | None = sys.__stdout__ if name == "stdout" else sys.__stderr__
    if current is not own:
        return None
    file = PatientFile(fd, lambda text: _report_elsewhere(fd, text))
    is_unbuffered = isinstance(current, io.TextIOWrapper) and current.write_through
    stream = io.TextIOWrapper(
        file if is_unbuffered else io.BufferedWriter(cast(Any, file)), "utf-8", "backslashreplace"
    )
    if isinstance(current, io.TextIOWrapper):
        stream.reconfigure(
            encoding=current.encoding,
            errors=current.errors,
            line_buffering=current.line_buffering,
            write_through=current.write_through,
        )
        _flush(current)
    if name == "stdout":
        sys.stdout = stream
    else:
        sys.stderr = stream
    return file


def _flush(stream: TextIO) -> None:
    """Write what was printed before; what the system refuses now is lost, as it will be again."""
    with suppress(OSError):
        stream.flush()


def _report_elsewhere(fd: int, text: str) -> None:
    """Write a line about stream `fd` to the other one, without Python's buffers, and drop it if that fails too."""
    other = 2 if fd == 1 else 1
    with suppress(OSError):  # both are gone: there is nowhere left to say it
        os.write(other, f"{text}\n".encode())
