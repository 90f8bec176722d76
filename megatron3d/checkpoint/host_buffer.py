"""Host memory that a rank and the process that writes its checkpoints share: allocated once and used for every save.

It is an anonymous file in memory (Linux: memfd), whose descriptor the other process inherits, so nothing is sent
between the two and nothing is left behind when both have ended. Unlike /dev/shm it has no limit of its own.
"""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from megatron3d.errors import MemoryShortError


class HostBuffer:
    """Bytes that grow when asked for more and never shrink; `data` is uint8 [size].

    Arrays that were taken from `data` before it grew show the same bytes.
    """

    def __init__(self, fd: int | None = None) -> None:
        """Share the memory behind a descriptor that was inherited, or make a new one, which is empty."""
        self.fd = os.memfd_create("megatron3d-checkpoint") if fd is None else fd
        self.data: NDArray[np.uint8] = np.empty(0, np.uint8)

    def reserve(self, size_bytes: int) -> None:
        """Grow the buffer to at least `size_bytes`, with every page allocated.

        Raises:
            MemoryShortError: the system has no more.
        """
        if size_bytes <= len(self.data):
            return
        try:
            os.posix_fallocate(self.fd, 0, size_bytes)
            self._map(size_bytes, mmap.MAP_POPULATE)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise MemoryShortError(
                    f"--async-save needs {size_bytes:,} bytes of host memory for its copy of what this rank saves, "
                    "more than a file may have here (ulimit -f), and such memory counts as one; raise the limit or "
                    "leave the option out"
                ) from error
            raise MemoryShortError(
                f"--async-save needs {size_bytes:,} bytes of host memory for its copy of what this rank saves, which "
                f"the system refused ({error.strerror}); leave the option out, or save less on this machine "
                "(--no-save-optim, fewer ranks on it)"
            ) from error

    def follow(self, size_bytes: int) -> None:
        """Map at least `size_bytes`, which the process that made the buffer has reserved."""
        if size_bytes > len(self.data):
            self._map(size_bytes, 0)

    def _map(self, size_bytes: int, more_flags: int) -> None:
        self.data = np.frombuffer(mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED | more_flags), np.uint8)

    def close(self) -> None:
        """Give the descriptor back, and the memory once nobody looks at it."""
        self.data = np.empty(0, np.uint8)
        os.close(self.fd)
