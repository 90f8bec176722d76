"""ChunkWriter: a new file written in large chunks past the page cache, the next filled while the last is on its way.

Through the page cache every byte costs a page of memory and a copy by the kernel, and the disk idles until the kernel
writes out. A direct write needs aligned addresses, offsets and lengths, so bytes are gathered in two aligned buffers
first, which is also where their checksums are taken. What is left at the end is no whole chunk and goes through the
page cache, as everything does on file systems that refuse direct writes, such as tmpfs.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from megatron3d.storage.checksum import crc32

# Large enough that system calls cost nothing, small enough that a chunk is still in the cache when its checksum is
# taken and when the device reads it.
CHUNK_BYTES = 4 << 20
_NUM_BUFFERS = 2

_DIRECT_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)


class ChunkWriter:
    """Appends to the file open at `fd`, which is empty; a context whose end is that of the file.

    Args:
        fd: open for writing.
        path: its name, for errors: a call by descriptor does not name the file.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path = fd, path
        self._chunk_bytes = CHUNK_BYTES
        self._buffers = [memoryview(mmap.mmap(-1, self._chunk_bytes)) for _ in range(_NUM_BUFFERS)]
        self._pending: list[Future[None] | None] = [None] * _NUM_BUFFERS
        self._threads = ThreadPoolExecutor(_NUM_BUFFERS)
        self._number = 0  # of the chunk that is being filled
        self._filled = 0
        self._is_direct = False

    def __enter__(self) -> ChunkWriter:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for all chunks; write what is left, unless the block raised. Raises: OSError if the system refused."""
        try:
            if error is None:
                self._finish()
        finally:
            self._threads.shutdown()

    def write(self, data: memoryview) -> int:
        """Append bytes; return their CRC-32. They may change afterwards: what is left of them was copied.

        Raises:
            OSError: the system refused this or an earlier chunk.
        """
        checksum = 0
        while data:
            count = min(len(data), self._chunk_bytes - self._filled)
            space = self._buffers[self._number % _NUM_BUFFERS][self._filled : self._filled + count]
            space[:] = data[:count]
            checksum = crc32(space, checksum)
            data = data[count:]
            self._filled += count
            if self._filled == self._chunk_bytes:
                self._send()
        return checksum

    def _send(self) -> None:
        """Start writing the chunk that is full, and wait until the buffer of the next one is free."""
        if self._number == 0:
            self._is_direct = self._set_direct(True)
        place = self._number % _NUM_BUFFERS
        start = self._number * self._chunk_bytes
        self._pending[place] = self._threads.submit(self._write_at, start, self._buffers[place])
        self._number += 1
        self._filled = 0
        self._wait(self._number % _NUM_BUFFERS)

    def _finish(self) -> None:
        for place in range(_NUM_BUFFERS):
            self._wait(place)
        if self._is_direct:
            self._is_direct = self._set_direct(False)
        last = self._buffers[self._number % _NUM_BUFFERS][: self._filled]
        self._write_at(self._number * self._chunk_bytes, last)

    def _wait(self, place: int) -> None:
        pending, self._pending[place] = self._pending[place], None
        if pending is not None:
            pending.result()

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:
            was_direct = self._is_direct
            try:
                count = os.pwrite(self._fd, data, offset)
            except OSError as error:
                if was_direct and error.errno in _DIRECT_REFUSED:
                    self._is_direct = self._set_direct(False)
                    continue
                error.filename = str(self._path)
                raise
            data, offset = data[count:], offset + count

    def _set_direct(self, wanted: bool) -> bool:
        """Switch direct writes on or off, which not every file system can; whether they are on now."""
        if sys.platform != "linux":
            return False
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
        except OSError as error:
            if error.errno not in _DIRECT_REFUSED:
                raise
            return False
        return wanted
