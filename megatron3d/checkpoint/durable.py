"""Writing that survives a crash: a file counts as written when it and its directory have reached the disk.

Every function here raises the `OSError` of the system; `storage_errors` turns it into the sentence for the user.
Nothing here knows what a checkpoint is.
"""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron3d.errors import StorageError

# Large enough that system calls cost nothing, small enough that a chunk is still in the cache when it is written
# after its checksum was taken.
CHUNK_BYTES = 4 << 20

_ADVICE = {
    errno.ENOSPC: "free space there or give another --save directory",
    errno.EDQUOT: "free space within the quota or give another --save directory",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or give another --save directory",
    errno.EROFS: "mount it writable or give another --save directory",
    errno.EACCES: "make it writable for this user or give another --save directory",
    errno.EPERM: "make it writable for this user or give another --save directory",
    errno.ENOENT: "the --save directory must lie on a file system that all nodes of the run share",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` met while writing below `path` into a `StorageError` with the reason and what to do.

    Raises:
        StorageError: the block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        advice = _ADVICE.get(error.errno or 0, "look at the file system or give another --save directory")
        raise StorageError(
            f"could not write checkpoint file {where}: {reason}; earlier checkpoints are untouched; {advice}"
        ) from error


def write_file(path: Path, pieces: Iterable[memoryview | bytes]) -> list[int]:
    """Write `pieces` one after another into a new file, wait until they are on the disk, return the CRC-32 of each.

    Raises:
        OSError: the system refused; the file may then hold a part of the pieces.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        checksums = [_write_piece(fd, memoryview(piece).cast("B"), path) for piece in pieces]
        os.fsync(fd)
    finally:
        os.close(fd)
    return checksums


def _write_piece(fd: int, piece: memoryview, path: Path) -> int:
    checksum = 0
    for start in range(0, len(piece), CHUNK_BYTES):
        chunk = piece[start : start + CHUNK_BYTES]
        checksum = zlib.crc32(chunk, checksum)
        while chunk:
            try:
                chunk = chunk[os.write(fd, chunk) :]
            except OSError as error:
                error.filename = str(path)  # write() knows a descriptor only; the user needs the file
                raise
    return checksum


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
