"""BlockFile: one file without a name, read and written in blocks past the page cache where the file system allows it.

The file has no entry in any directory, so the kernel gives its space back when the process ends, however it ends, and
no other process can ever read what a killed one had half written. Its space is taken when it grows, so a disk that is
too small says so at the start of a run.

Direct reads and writes move data between disk and memory without a copy in the page cache. They need addresses,
offsets and lengths that are multiples of a block; what is not goes through a small aligned buffer of the thread.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from megatron3d.storage.refusals import storage_errors

BLOCK_BYTES = 4096  # a multiple of the sector of every common disk, and the page of a mapping
# Large enough that a request costs nothing beside its bytes, small enough to lie in the cache when it is checked.
CHUNK_BYTES = 4 << 20

_DIRECT_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)


def round_up(num_bytes: int) -> int:
    """The next multiple of a block."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def offload_errors(action: str, where: str) -> AbstractContextManager[None]:
    """Turn an `OSError` of the block into a `StorageError` that names the action, the file and what to do."""
    return storage_errors(
        action,
        where,
        assurance="the checkpoints are untouched, the next run resumes from the last",
        way_out="give another --offload-dir",
    )


class _Bounce(threading.local):
    """An aligned buffer of each thread, made when the thread first needs it."""

    def __init__(self) -> None:
        self.buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))


class BlockFile:
    """The file. Safe to use from several threads where their ranges do not overlap.

    Args:
        directory: where its space is taken; made if it is missing.
        label: what messages call the file.
        direct: whether to go past the page cache where that is possible; `is_direct` says whether it is.

    Raises:
        StorageError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path, label: str, *, direct: bool = True) -> None:
        self.name = str(directory / label)
        self.size_bytes = 0
        self._bounce = _Bounce()
        with offload_errors("make the offload file", self.name):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - lives as long as this
        self._fd = self._file.fileno()
        self.is_direct = direct and self._takes_direct()

    def _takes_direct(self) -> bool:
        """Switch direct access on and try it; some file systems take the switch and refuse the access."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            with mmap.mmap(-1, BLOCK_BYTES) as block:
                os.pwritev(self._fd, [block], 0)
                os.preadv(self._fd, [block], 0)
        except OSError as error:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
            if error.errno in _DIRECT_REFUSED:
                return False
            with offload_errors("write the offload file", self.name):
                raise
        return True

    def grow(self, size_bytes: int) -> None:
        """Take space up to `size_bytes`; what is added reads as zeros.

        Raises:
            StorageError: there is not that much.
        """
        target = round_up(size_bytes)
        if target > self.size_bytes:
            with offload_errors(f"take {target / 1e9:.3f} GB for the offload file", self.name):
                os.posix_fallocate(self._fd, self.size_bytes, target - self.size_bytes)
            self.size_bytes = target

    def read(self, offset: int, into: memoryview, *, is_aligned: bool) -> None:
        """Fill `into` from `offset`, a multiple of a block; `is_aligned` says whether its address is one too.

        Raises:
            StorageError: the disk refused, or the file is shorter.
        """
        fits = is_aligned and len(into) % BLOCK_BYTES == 0
        target = into if fits else self._bounce.buffer[: round_up(len(into))]
        with offload_errors(f"read {len(into)} bytes at offset {offset} of the offload file", self.name):
            _transfer(os.preadv, self._fd, target, offset)
        if not fits:
            into[:] = target[: len(into)]
        self._drop_cached(offset, len(target))

    def write(self, offset: int, source: memoryview, *, is_aligned: bool) -> None:
        """Write `source` at `offset`, a multiple of a block, and zeros up to the next one.

        Raises:
            StorageError: the disk refused.
        """
        data = source
        if not is_aligned or len(source) % BLOCK_BYTES:
            data = self._bounce.buffer[: round_up(len(source))]
            data[: len(source)] = source
            data[len(source) :] = bytes(len(data) - len(source))
        with offload_errors(f"write {len(source)} bytes at offset {offset} of the offload file", self.name):
            _transfer(os.pwritev, self._fd, data, offset)
        self._drop_cached(offset, len(data))

    def map(self, offset: int, num_bytes: int) -> mmap.mmap:
        """A part of the file as memory that is read and written back by the kernel; not to be mixed with `write`s of
        the same part while it lives. `offset` is a multiple of a block."""
        assert offset % mmap.ALLOCATIONGRANULARITY == 0, f"offset {offset} is not a multiple of a page"
        with offload_errors(f"map {num_bytes} bytes of the offload file", self.name):
            return mmap.mmap(self._fd, num_bytes, mmap.MAP_SHARED, offset=offset)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()

    def _drop_cached(self, offset: int, num_bytes: int) -> None:
        """Ask that the page cache does not grow by what was read or written once."""
        if not self.is_direct:
            os.posix_fadvise(self._fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _transfer(call: Callable[[int, list[memoryview], int], int], fd: int, buffer: memoryview, offset: int) -> None:
    """Read or write all of `buffer`: the system may do less than it was asked for."""
    done = 0
    while done < len(buffer):
        moved = call(fd, [buffer[done:]], offset + done)
        if moved == 0:
            raise OSError(errno.EIO, f"the file ends at {offset + done}")
        done += moved
