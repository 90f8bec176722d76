"""Writing that survives a crash: a file counts as written when it and its directory have reached the disk.

Every function here raises the `OSError` of the system; `refusals.storage_errors` turns it into a sentence.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

# Large enough that system calls cost nothing, small enough that a chunk is still in the cache when it is written
# after its checksum was taken.
CHUNK_BYTES = 4 << 20


def write_file(path: Path, buffers: Iterable[memoryview | bytes]) -> list[int]:
    """Write `buffers` one after another into a new file, wait until they are on the disk, return the CRC-32 of each.

    Raises:
        OSError: the system refused; the file may then hold a part of the buffers.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        checksums = [_write_buffer(fd, memoryview(buffer).cast("B"), path) for buffer in buffers]
        os.fsync(fd)
    finally:
        os.close(fd)
    return checksums


def _write_buffer(fd: int, buffer: memoryview, path: Path) -> int:
    checksum = 0
    for start in range(0, len(buffer), CHUNK_BYTES):
        chunk = buffer[start : start + CHUNK_BYTES]
        checksum = zlib.crc32(chunk, checksum)
        while chunk:
            try:
                chunk = chunk[os.write(fd, chunk) :]
            except OSError as error:
                error.filename = str(path)  # write() knows a descriptor only; the user needs the file
                raise
    return checksum


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
