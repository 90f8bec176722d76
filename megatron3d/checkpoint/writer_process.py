"""The process that writes a rank's part of a checkpoint while the rank trains on; `writer.py` starts and asks it.

    python -m megatron3d.checkpoint.writer_process DESCRIPTOR PARENT_PID

It reads orders from standard input and answers each on standard output, one JSON object a line. The bytes are in a
`HostBuffer`: the image of a safetensors file, whose own header says where each entry lies, and documents. It imports
neither torch nor anything that starts threads with work of their own, so it is there within a tenth of a second.

It ends when its input does, or within an instant of its parent's end; signals to the job's processes are its parent's
affair. What it was writing then lies in a temporary directory, which the next save removes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron3d.checkpoint.host_buffer import HostBuffer
from megatron3d.process.parent import watch_parent
from megatron3d.storage.durable import write_file

_PARENT_POLL_S = 0.1
_CHUNK_BYTES = 1 << 20  # looked at together, small enough for the cache
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# By the dtype's name in a safetensors file: bits that are all set in NaN and infinity and in no finite number.
_NOT_FINITE: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}


@dataclass(frozen=True)
class Part:
    """Bytes [start, stop) of the buffer, and the absolute path of the file that shall have them."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class WriteOrder:
    """What to write: the safetensors file of a rank that has one, and documents, of the checkpoint of `step`."""

    step: int
    shard: Part | None
    documents: list[Part]

    def to_json(self) -> str:
        """One line of text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> WriteOrder:
        """The order of such a line."""
        found = json.loads(text)
        shard = found["shard"] and Part(**found["shard"])
        return cls(found["step"], shard, [Part(**one) for one in found["documents"]])

    @property
    def size_bytes(self) -> int:
        """Where the part of the buffer that it speaks of ends."""
        return max((part.stop for part in (self.shard, *self.documents) if part is not None), default=0)


@dataclass(frozen=True)
class WriteOutcome:
    """What became of an order: everything is on the disk unless `not_finite` or `error` says otherwise.

    Attributes:
        step: that of the order.
        checksums: CRC-32 of each entry as it was written, in the order of the file, and of each document.
        not_finite: entries with NaN or infinity in them; then nothing was written.
        error: error number, text and file of what the system refused.
    """

    step: int
    checksums: list[int] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    error: tuple[int, str, str] | None = None

    def to_json(self) -> str:
        """One line of text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> WriteOutcome:
        """The outcome of such a line."""
        found = json.loads(text)
        return cls(**found | {"error": found["error"] and tuple(found["error"])})


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    data: NDArray[np.uint8]


def carry_out(order: WriteOrder, buffer: HostBuffer) -> WriteOutcome:
    """Write what an order asks for and wait until it is on the disk."""
    buffer.follow(order.size_bytes)
    checksums: list[int] = []
    try:
        if order.shard is not None:
            image = buffer.data[order.shard.start : order.shard.stop]
            header, entries = _header(image), list(_entries(image))
            if wrong := [entry.name for entry in entries if not is_finite(entry.data, entry.dtype)]:
                return WriteOutcome(order.step, not_finite=wrong)
            parts = [header, *(entry.data for entry in entries)]
            checksums += write_file(Path(order.shard.path), (part.data for part in parts))[1:]
        for document in order.documents:
            checksums += write_file(Path(document.path), [buffer.data[document.start : document.stop].data])
    except OSError as error:
        return WriteOutcome(order.step, error=(error.errno or 0, error.strerror or str(error), error.filename or ""))
    return WriteOutcome(order.step, checksums)


def _header(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image[: 8 + int.from_bytes(image[:8].tobytes(), "little")]


def _entries(image: NDArray[np.uint8]) -> Iterator[_Entry]:
    """The entries of a safetensors file in the order of their bytes, which is that of its header."""
    header = _header(image)
    for name, entry in json.loads(header[8:].tobytes()).items():
        start, stop = entry["data_offsets"]
        yield _Entry(name, entry["dtype"], image[len(header) + start : len(header) + stop])


def is_finite(data: NDArray[np.uint8], dtype: str) -> bool:
    """Whether the bytes of numbers of a dtype, by its name in a safetensors file, hold neither NaN nor infinity."""
    if dtype not in _NOT_FINITE:
        return True
    word, bits = _NOT_FINITE[dtype]
    mask = word(bits)
    chunks = (data[start : start + _CHUNK_BYTES].view(word) for start in range(0, len(data), _CHUNK_BYTES))
    return not any(np.any((chunk & mask) == mask) for chunk in chunks)


def main() -> None:
    """Carry out orders until there are no more."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    buffer, parent_pid = HostBuffer(int(sys.argv[1])), int(sys.argv[2])
    watch_parent(parent_pid, lambda: os._exit(1), poll_s=_PARENT_POLL_S)
    for line in sys.stdin.buffer:
        print(carry_out(WriteOrder.from_json(line), buffer).to_json(), flush=True)


if __name__ == "__main__":
    main()
