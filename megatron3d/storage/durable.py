"""Writing that survives a crash: a file counts as written when it and its directory have reached the disk.

Every function here raises the `OSError` of the system; `refusals.storage_errors` turns it into a sentence.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from megatron3d.storage.chunks import ChunkWriter


def write_file(path: Path, buffers: Iterable[memoryview | bytes]) -> list[int]:
    """Write `buffers` one after another into a new file, wait until they are on the disk, return the CRC-32 of each.

    Raises:
        OSError: the system refused; the file may then hold a part of the buffers.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        with ChunkWriter(fd, path) as writer:
            checksums = [writer.write(memoryview(buffer).cast("B")) for buffer in buffers]
        os.fsync(fd)
    finally:
        os.close(fd)
    return checksums


def flush_to_disk(stream: IO) -> None:
    """Empty the buffers of `stream` and of the operating system, so that a rename after it is safe."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the entries of the directory (files created in it, renames) are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(directory: Path) -> None:
    """Remove a directory so that no crash leaves a half-removed one under its own name.

    It is renamed out of the way first; what a crash leaves of `.gone-NAME` is removed by the next save.
    """
    gone = directory.with_name(f".gone-{directory.name.lstrip('.')}")
    if gone.exists():
        shutil.rmtree(gone)
    os.rename(directory, gone)
    shutil.rmtree(gone)
