"""FileStore: named buffers on disk, read and written by a few threads, every chunk of them checked when it is read.

Transfers are start/finish pairs: `start_read` and `start_write` return at once and the buffer belongs to the transfer
until `wait`. Threads suffice: the system calls and the checksums run without Python's lock, and requests of a few
megabytes keep a disk busy. What is stored lives as long as the process; checkpoints are what outlives it.

Source: Rajbhandari et al. 2021 (ZeRO-Infinity), section 6.3 (DeepNVMe), which does this in C++ with libaio.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron3d.errors import StorageError
from megatron3d.offload.block_file import BLOCK_BYTES, CHUNK_BYTES, BlockFile, round_up
from megatron3d.storage.checksum import crc32

NUM_THREADS = 4  # a chunk is checked while others move; more gave nothing on the disks measured

_Move = Callable[[str, int, memoryview, bool], None]


class Transfer:
    """A read or write under way; keeps its buffer alive until somebody has waited for it."""

    def __init__(self, parts: list[Future[None]], buffer: Tensor) -> None:
        self._parts = parts
        self._buffer: Tensor | None = buffer

    def wait(self) -> None:
        """Return when it is over.

        Raises:
            StorageError: the disk refused, or what was read is not what was written.
        """
        wait_for(self._parts)  # All of them: after an error none may still write into the buffer.
        self._buffer = None
        for part in self._parts:
            part.result()


@dataclass
class _Extent:
    """Where a named buffer lies in the file, and the checksum of each of its chunks."""

    offset: int
    num_bytes: int
    checksums: list[int]
    last: Transfer | None = field(default=None)


class FileStore:
    """Named buffers in one file that has no name on the disk (see `block_file.py`).

    Args:
        directory: where the file's space is taken, best on a local NVMe disk.
        label: what messages call the file, such as "rank00003".
        num_threads: transfers of chunks that are under way at once.
        direct: whether to go past the page cache where the file system allows it.

    Raises:
        StorageError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path, label: str, *, num_threads: int = NUM_THREADS, direct: bool = True) -> None:
        self.file = BlockFile(directory, label, direct=direct)
        self._extents: dict[str, _Extent] = {}
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="offload")

    @property
    def size_bytes(self) -> int:
        """Bytes of disk that are taken."""
        return self.file.size_bytes

    def reserve(self, name: str, num_bytes: int) -> None:
        """Take space for a buffer, which then reads as zeros.

        Raises:
            StorageError: the disk is full.
        """
        assert name not in self._extents, f"{name} is reserved already"
        offset = self.file.size_bytes
        self.file.grow(offset + num_bytes)
        lengths = [length for _, length in _chunks(num_bytes)]
        of_zeros = {length: crc32(bytes(length)) for length in set(lengths)}
        self._extents[name] = _Extent(offset, num_bytes, [of_zeros[length] for length in lengths])

    def start_read(self, name: str, into: Tensor) -> Transfer:
        """Start filling `into`, contiguous, on the host and as many bytes as were reserved.

        Waits for the last transfer of the same buffer. `wait` of the result raises `StorageError` where a chunk is not
        what was written.
        """
        return self._start(name, into, self._read_chunk)

    def start_write(self, name: str, source: Tensor) -> Transfer:
        """Start writing `source`, contiguous, on the host and as many bytes as were reserved.

        Waits for the last transfer of the same buffer. The source must not change until `wait` of the result.
        """
        return self._start(name, source, self._write_chunk)

    def _start(self, name: str, buffer: Tensor, move: _Move) -> Transfer:
        extent = self._settled(name)
        data = _bytes_of(buffer)
        assert len(data) == extent.num_bytes, f"{name} has {extent.num_bytes} bytes, the buffer {len(data)}"
        is_aligned = buffer.data_ptr() % BLOCK_BYTES == 0
        parts = [
            self._pool.submit(move, name, number, data[start : start + length], is_aligned)
            for number, (start, length) in enumerate(_chunks(extent.num_bytes))
        ]
        extent.last = Transfer(parts, buffer)
        return extent.last

    def _settled(self, name: str) -> _Extent:
        extent = self._extents[name]
        if extent.last is not None:
            extent.last.wait()
            extent.last = None
        return extent

    def _read_chunk(self, name: str, number: int, into: memoryview, is_aligned: bool) -> None:
        extent = self._extents[name]
        self.file.read(extent.offset + number * CHUNK_BYTES, into, is_aligned=is_aligned)
        self._check(name, number, into)

    def _write_chunk(self, name: str, number: int, source: memoryview, is_aligned: bool) -> None:
        extent = self._extents[name]
        extent.checksums[number] = crc32(source)
        self.file.write(extent.offset + number * CHUNK_BYTES, source, is_aligned=is_aligned)

    def _check(self, name: str, number: int, data: memoryview) -> None:
        extent = self._extents[name]
        found, written = crc32(data), extent.checksums[number]
        if found != written:
            raise StorageError(
                f"the offload file {self.file.name} is damaged at offset {extent.offset + number * CHUNK_BYTES} "
                f"({len(data)} bytes of {name}): checksum {found:08x} instead of {written:08x}; start again to go on "
                "from the last checkpoint, and check the disk under --offload-dir"
            )

    @contextmanager
    def mapped(self, name: str, *, writes: bool) -> Iterator[Tensor]:
        """A buffer as a tensor of bytes that takes no memory of the process: the kernel brings what is touched.

        Args:
            name: of the buffer; nobody else may use it in the meantime.
            writes: whether the block changes it; its checksums are then taken anew at the end, also of a block that
                raises: a load that finds damage has written some, and another one may follow.

        Raises:
            StorageError: the buffer is not what was written.
        """
        extent = self._settled(name)
        pages = self.file.map(extent.offset, round_up(extent.num_bytes))
        tensor = torch.frombuffer(pages, dtype=torch.uint8, count=extent.num_bytes)
        data = _bytes_of(tensor)
        for number, (start, length) in enumerate(_chunks(extent.num_bytes)):
            self._check(name, number, data[start : start + length])
        try:
            yield tensor
        finally:
            if writes:
                pages.flush()
                extent.checksums = [crc32(data[start : start + length]) for start, length in _chunks(len(data))]

    def close(self) -> None:
        """Wait for what is under way and give the space back."""
        self._pool.shutdown()
        self.file.close()


def _chunks(num_bytes: int) -> list[tuple[int, int]]:
    """Start and length of each chunk of a buffer."""
    return [(start, min(CHUNK_BYTES, num_bytes - start)) for start in range(0, num_bytes, CHUNK_BYTES)]


def _bytes_of(tensor: Tensor) -> memoryview:
    assert tensor.is_contiguous() and tensor.device.type == "cpu", "transfers need contiguous memory of the host"
    # Not through numpy, which would forbid the tensor's storage to be freed and taken again later.
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
