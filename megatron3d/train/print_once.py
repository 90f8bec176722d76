"""A sentence that several processes of a machine have to report, printed by one of them.

The processes share a directory. Whoever gets the lock on the sentence's file first prints and writes so into the file;
the others wait for the lock, find that, and keep silent. The kernel frees the lock of a process that is killed, so a
process that dies before it has printed leaves the sentence to the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron3d.process.streams import lost_bytes


def print_once(text: str, *, key: str, directory: Path) -> bool:
    """Print `text` to standard error unless a process printed one with the same `key` before; whether it did.

    Args:
        text: what is printed.
        key: what makes it the same sentence, such as the sentence without the rank that says it.
        directory: shared by the processes that are to print once among them, and by no others. Where it cannot be
            written or locked, every process prints: twice is better than never.
    """
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(_locked(directory / f"printed-{name}"))
        except OSError:
            return _print(text)
        if os.fstat(file).st_size:
            return False
        if not _print(text):
            return False  # nobody can read it: the next one may have another standard error
        with contextlib.suppress(OSError):  # a full disk: then the next one prints it too
            os.write(file, b"printed\n")
        return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, made if it is not there, with its lock held. Raises: OSError if the file system refuses."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _print(text: str) -> bool:
    """Print to standard error; whether the system took all of it."""
    before = lost_bytes(sys.stderr)
    print(text, file=sys.stderr, flush=True)
    return lost_bytes(sys.stderr) == before
