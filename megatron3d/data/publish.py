"""How files of the data room reach the disk: written under another name, forced out, then renamed.

A reader therefore finds a whole file or none, whatever happens to the writer.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small UTF-8 file whole or not at all. Raises: StorageError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                flush_to_disk(stream)
            temporary.replace(path)
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
