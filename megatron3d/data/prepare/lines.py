"""Lines of text in blocks: the process that reads a corpus cuts blocks, the one that parses them splits the lines.

Finding where lines end and counting them costs little next to a Python object for each line, so the reader does only
that. A block of a plain file need not even hold its bytes: any process that sees the file can read them by their place.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from megatron3d.data.prepare.records import RawBatch, Reason, Unreadable
from megatron3d.data.prepare.spans import Position
from megatron3d.errors import DataError

_BLOCK_BYTES = 1 << 20
_BLOCK_LINES = 1024
_SKIPPED_BYTES = 1 << 20  # of a line over the limit, read at once and dropped
_START_BYTES = 1000  # of such a line, kept for its reject


@dataclass(frozen=True)
class FileRange:
    """Bytes `first` up to `end` of a file."""

    file: Path
    first: int
    end: int

    def read(self) -> bytes:
        """The bytes. Raises: DataError if the file cannot be read, or has become shorter."""
        try:
            with open(self.file, "rb") as stream:
                stream.seek(self.first)
                content = stream.read(self.end - self.first)
        except OSError as error:
            raise DataError(f"{self.file} cannot be read ({error.strerror or error}).") from error
        if len(content) < self.end - self.first:
            raise changed(self.file)
        return content


@dataclass(frozen=True)
class CutLines:
    """Whole lines in a row: how many lines and bytes of the stream lie before them, how many they are, and their bytes.

    `content` is None where it is not wanted. A line over the limit comes alone, with its first bytes only, and
    `is_too_long`.
    """

    lines_before: int
    num_lines: int
    first: int
    end: int
    content: bytes | None
    is_too_long: bool = False


@dataclass(frozen=True)
class LineBlock:
    """Lines in a row of one file, not yet split; `RawBatch` says what its `path`, `input_bytes` and `end` are too.

    Each has its line feed, but for a last line of a file without one, which comes alone.
    """

    path: str
    content: bytes | FileRange
    lines_before: int
    num_lines: int
    begins_file: bool
    max_line_bytes: int
    input_bytes: int
    end: Position

    def split(self) -> RawBatch:
        """The lines that are not blank, without their line feed. A line over the limit is an `Unreadable`.

        Raises: DataError if the file cannot be read, or has changed since the block was cut.
        """
        content = self.content if isinstance(self.content, bytes) else self.content.read()
        lines = content.split(b"\n")
        is_ended = not lines[-1]
        if is_ended:
            lines.pop()
        if len(lines) != self.num_lines or not (is_ended or self.num_lines == 1):
            raise changed(self.path)
        numbers: list[int] = []
        records: list[bytes | dict[str, Any] | Unreadable] = []
        for number, line in enumerate(lines, start=self.lines_before + 1):
            if len(line) > self.max_line_bytes and len(line.removesuffix(b"\r")) > self.max_line_bytes:
                has_end = number < self.lines_before + self.num_lines or content.endswith(b"\n")
                records.append(too_long(len(line) + has_end, self.max_line_bytes, line))
            else:
                if self.begins_file and number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line or line.isspace():
                    continue
                records.append(line)
            numbers.append(number)
        return RawBatch(self.path, numbers, records, self.input_bytes, self.end)


def as_records(batch: RawBatch | LineBlock) -> RawBatch:
    """The batch with its records apart. Raises: as `LineBlock.split`."""
    return batch.split() if isinstance(batch, LineBlock) else batch


def changed(file: Path | str) -> DataError:
    """The error for a file that something writes while it is read."""
    return DataError(f"{file} has changed while it was read; run again when nothing writes it.")


def too_long(size: int, max_line_bytes: int, start: bytes) -> Unreadable:
    """What stands for a line of `size` bytes with its end."""
    detail = f"this line takes {size:,} bytes with its end, more than --max-line-bytes {max_line_bytes:,}."
    return Unreadable(Reason.TOO_LONG, detail, start[:_START_BYTES])


def cut_lines(
    stream: BinaryIO, begin: Position, *, end: int | None, max_line_bytes: int, with_content: bool
) -> Iterator[CutLines]:
    """Cut a stream, from where it stands, into blocks of about 1 MiB or 1024 lines.

    Args:
        stream: whose place is `begin` and the beginning of a line.
        end: the byte at which a line ends and the reading too; None for the end of the stream.
        max_line_bytes: the limit of a line, its end not counted, up to which its bytes are held. Lines over it that
            lie within a block are left to `LineBlock.split`.
        with_content: whether the blocks hold their bytes.
    """
    number, first, behind = begin.num_read, begin.byte, begin.byte  # `first` begins the next block, `behind` is read
    held: list[bytes] = []  # of the bytes between the two, which hold no line feed
    buffer = memoryview(bytearray(_BLOCK_BYTES))  # the same for all, which costs half of new memory for each
    source = cast(io.BufferedIOBase, stream)
    while num_read := source.readinto(buffer if end is None else buffer[: max(0, end - behind)]):
        at, chunk = behind, buffer[:num_read]
        behind += num_read
        size = 0  # of its bytes up to the last line feed
        for num_lines, start, size in _parts(chunk):
            content = b"".join((*held, chunk[start:size])) if with_content else None
            yield CutLines(number, num_lines, first, at + size, content)
            number, first, held = number + num_lines, at + size, []
        if with_content or sum(map(len, held)) < _START_BYTES:
            held.append(bytes(chunk[size:] if with_content else chunk[size : size + _START_BYTES]))
        if behind - first > max_line_bytes + len(b"\r\n"):
            behind += skip_line(stream)
            yield CutLines(number, 1, first, behind, b"".join(held), is_too_long=True)
            number, first, held = number + 1, behind, []
    if behind > first:
        yield CutLines(number, 1, first, behind, b"".join(held) if with_content else None)


def skip_line(stream: BinaryIO) -> int:
    """Read to the end of a line and drop it; the bytes that it took."""
    size = 0
    while piece := stream.readline(_SKIPPED_BYTES):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def _parts(chunk: memoryview) -> list[tuple[int, int, int]]:
    """Cuts of the whole lines that end in `chunk` into equal numbers up to a limit: how many, first byte, end."""
    ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + 1
    num_parts = -(-len(ends) // _BLOCK_LINES)
    counts = [len(ends) * part // num_parts for part in range(1, num_parts + 1)]
    cuts = [0, *(int(ends[count - 1]) for count in counts)]
    return [(behind - before, *cut) for (before, behind), cut in zip(pairwise([0, *counts]), pairwise(cuts))]
