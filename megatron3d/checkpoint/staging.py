"""The copy of what a rank saves: an image of its file in a host buffer, with checksums of what was copied.

Checksums are taken of the tensors themselves and not of the copy, where those are on the host. They go into the index,
and the writer process takes them again of what it writes: a buffer that holds anything but the state at this step, be
it of the save before, cannot be published.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron3d.checkpoint.host_buffer import HostBuffer
from megatron3d.checkpoint.shard_file import bytes_of, shard_header
from megatron3d.checkpoint.writer_process import Part, WriteOrder
from megatron3d.comm.device import synchronize
from megatron3d.storage.checksum import crc32

_THREADS = 2  # one is bound by the latency of memory; more would compete with other ranks of the machine
_ALIGNMENT = 4096
_CHUNK_BYTES = 1 << 18  # still in the cache when its checksum is taken


class Staged:
    """One save's bytes in the buffer of a rank, put there one file after another, and their checksums in that order."""

    def __init__(self, buffer: HostBuffer, step: int) -> None:
        self._buffer, self._step = buffer, step
        self._shard: Part | None = None
        self._documents: list[Part] = []
        self._end = 0
        self._entry_checksums: list[int] = []
        self._document_checksums: list[int] = []

    @property
    def order(self) -> WriteOrder:
        """What the writer process is asked for."""
        return WriteOrder(self._step, self._shard, self._documents)

    @property
    def checksums(self) -> list[int]:
        """CRC-32 of each entry of the shard and of each document, as the writer process must find them."""
        return [*self._entry_checksums, *self._document_checksums]

    def add_document(self, path: Path, text: bytes) -> int:
        """Copy a document; returns its CRC-32.

        Raises:
            MemoryShortError: the system has no memory for the buffer.
        """
        part = self._append(path, len(text))
        self._buffer.data[part.start : part.stop] = np.frombuffer(text, np.uint8)
        self._documents.append(part)
        self._document_checksums.append(crc32(text))
        return self._document_checksums[-1]

    def add_shard(self, path: Path, boxes: Mapping[str, Tensor]) -> tuple[int, dict[str, int]]:
        """Copy a rank's boxes (any device) as the safetensors file that they will be.

        Returns:
            The size of the file, and the CRC-32 of each box.

        Raises:
            MemoryShortError: the system has no memory for the buffer.
            ValueError: a dtype that the format does not know.
        """
        header, names = shard_header(boxes)
        part = self._append(path, len(header) + sum(tensor.nbytes for tensor in boxes.values()))
        image = self._buffer.data[part.start : part.stop]
        image[: len(header)] = np.frombuffer(header, np.uint8)
        for device in {tensor.device for tensor in boxes.values()}:
            synchronize(device)  # the threads below know nothing of the streams that fill the tensors
        copies, position = [], len(header)
        for name in names:
            copies.append((image[position : position + boxes[name].nbytes], boxes[name]))
            position += boxes[name].nbytes
        with ThreadPoolExecutor(_THREADS) as threads:
            self._entry_checksums = list(threads.map(_copy, *zip(*copies, strict=True)))
        self._shard = part
        return part.stop - part.start, dict(zip(names, self._entry_checksums, strict=True))

    def _append(self, path: Path, size: int) -> Part:
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._end = start + size
        self._buffer.reserve(self._end)
        return Part(str(path.absolute()), start, self._end)


def _copy(target: NDArray[np.uint8], source: Tensor) -> int:
    """Copy a tensor's bytes; returns the CRC-32 of what was copied."""
    if source.device.type != "cpu":
        torch.from_numpy(target).copy_(source.detach().flatten().view(torch.uint8))
        return crc32(target.data)
    held, checksum = bytes_of(source), 0
    for start in range(0, len(held), _CHUNK_BYTES):
        chunk = held[start : start + _CHUNK_BYTES]
        np.copyto(target[start : start + _CHUNK_BYTES], np.frombuffer(chunk, np.uint8))
        checksum = crc32(chunk, checksum)
    return checksum
