"""How files of the data room reach the disk: written under another name, forced out, then renamed.

A reader therefore finds a whole file or none, whatever happens to the writer.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megatron3d.errors import StorageError

_ADVICE = {
    errno.ENOSPC: "the file system is full; free some space or write elsewhere",
    errno.EFBIG: "it is over the size limit for files; raise the limit (ulimit -f) or write several smaller files",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "you may not write there; choose another place or change its permissions",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing `path` into a StorageError with what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the path and the file system")
        raise StorageError(f"{path} cannot be written ({error.strerror}): {advice}.") from error


def flush_to_disk(stream: IO) -> None:
    """Empty the buffers of `stream` and of the operating system, so that a rename after it is safe."""
    stream.flush()
    os.fsync(stream.fileno())


def open_partial(path: Path) -> IO[bytes]:
    """A new file beside `path`, named by the stream's `name`, to be written and then renamed to `path`.

    The stream holds the kernel's lock on it, which ends with the last process that has it open. So what a killed run
    left beside `path` can be told from what another one is writing now, and is removed here.

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


def _remove_abandoned(path: Path) -> None:
    """Remove the partial files beside `path` that no process has locked."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with suppress(OSError), open(partial, "rb") as stream:  # gone meanwhile, or locked by its writer
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def _lock(stream: IO[bytes]) -> None:
    with suppress(OSError):  # a file system without locks: another run then cannot lock, and so not remove it, either
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small UTF-8 file whole or not at all. Raises: StorageError."""
    with storage_errors(path), open_partial(path) as stream:
        try:
            stream.write(text.encode())
            flush_to_disk(stream)
            os.replace(stream.name, path)
        finally:
            Path(stream.name).unlink(missing_ok=True)
