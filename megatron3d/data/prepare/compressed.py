"""Compressed streams read to their very end: one that was cut off anywhere is an error and never a shorter text.

gzip's reader checks each member's end by itself, but takes a file of no bytes for a whole one; the reader that comes
with zstandard takes every end of the file for the end of the stream. Several members or frames in a row are one text,
as `cat a.gz b.gz` and parallel compressors make them.
"""

from __future__ import annotations

import gzip
import io
import zlib
from typing import BinaryIO, cast

import zstandard

# What a damaged or truncated stream raises while it is read.
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
_CHUNK_BYTES = 1 << 13  # of compressed bytes; at most 2**15 times as many come out of them (blocks of one byte)


def decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    """The bytes that `raw` holds compressed, by the ending of its name (`.gz`, `.zst`); `raw` itself for another one.

    Reading raises one of DAMAGE where the stream is damaged, or ends before its own end.
    """
    if suffix == ".gz":
        return cast(BinaryIO, _Gzip(fileobj=raw))  # a buffered reader too, without the write half of the type
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFrames(raw), 1 << 17)
    return raw


class _Gzip(gzip.GzipFile):
    """gzip's reader, for which no bytes at all are no stream."""

    def __init__(self, fileobj: BinaryIO) -> None:
        super().__init__(fileobj=fileobj)
        if not fileobj.read(1):
            raise EOFError("the file is empty and holds no gzip stream")
        fileobj.seek(-1, io.SEEK_CUR)


class _ZstdFrames(io.RawIOBase):
    """The content of the zstd frames of `raw`, one after another, each up to its own end."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_begun = False  # whether the current frame has had a byte
        self._num_frames = 0
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            chunk = self._raw.read(_CHUNK_BYTES)
            if not chunk:
                self._check_end()
                return 0
            self._ready = memoryview(self._decompress(chunk))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _decompress(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            self._is_begun = True
            parts.append(self._frame.decompress(chunk))
            chunk = b""
            if self._frame.eof:
                chunk = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._is_begun = False
                self._num_frames += 1
        return b"".join(parts)

    def _check_end(self) -> None:
        if self._is_begun:
            raise EOFError(f"the file ends inside zstd frame {self._num_frames}, counted from 0")
        if not self._num_frames:
            raise EOFError("the file is empty and holds no zstd frame")
