"""Compressed streams read to their very end: one that was cut off anywhere is an error and never a shorter text.

gzip's reader checks each member's end by itself, but takes a file of no bytes for a whole one. The readers of files
that come with zstandard, lzma and bz2 take the end of the file, or bytes that begin no stream, for the end of the
text; so these three are read through their decompressors of one stream. Several members or frames in a row are one
text, as `cat a.gz b.gz` and parallel compressors make them.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO, Protocol, cast

import zstandard


class DamagedStreamError(Exception):
    """A compressed stream whose decompressor refuses it with an error that could also come from the file system."""


# What a damaged or truncated stream raises while it is read.
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, lzma.LZMAError, DamagedStreamError)
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_CHUNK_BYTES = 1 << 13  # of compressed bytes; of zstd at most 2**15 times as many come out of them (blocks of one byte)
_MOST_BYTES = 1 << 20  # that xz and bz2 may give at once
_MAX_ZSTD_WINDOW = 1 << 31  # `zstd --long=31`, which public corpora use; the library's own limit is 2**27


def decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    """The bytes that `raw` holds compressed, by the ending of its name (COMPRESSIONS); `raw` itself for another one.

    Reading raises one of DAMAGE where the stream is damaged, or ends before its own end.
    """
    if suffix == ".gz":
        return cast(BinaryIO, _Gzip(fileobj=raw))  # a buffered reader too, without the write half of the type
    if suffix == ".zst":
        return io.BufferedReader(_Streams(raw, "zstd frame", _ZstdFrame), 1 << 17)
    if suffix == ".xz":
        return io.BufferedReader(_Streams(raw, "xz stream", lzma.LZMADecompressor, padding=4), 1 << 17)
    if suffix == ".bz2":
        return io.BufferedReader(_Streams(raw, "bzip2 stream", bz2.BZ2Decompressor), 1 << 17)
    return raw


class _Gzip(gzip.GzipFile):
    """gzip's reader, for which no bytes at all are no stream."""

    def __init__(self, fileobj: BinaryIO) -> None:
        super().__init__(fileobj=fileobj)
        if not fileobj.read(1):
            raise EOFError("the file is empty and holds no gzip stream")
        fileobj.seek(-1, io.SEEK_CUR)


class _Stream(Protocol):
    """The decompressor of one stream: `unused_data` are the bytes behind its end, which `eof` reports."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Streams(io.RawIOBase):
    """The content of the compressed streams in `raw`, one after another, each up to its own end.

    `name` is what the format calls one of them, `padding` the size of the groups of zero bytes that may stand behind.
    """

    def __init__(self, raw: BinaryIO, name: str, new_stream: Callable[[], _Stream], *, padding: int = 0) -> None:
        self._raw, self._name, self._new_stream, self._padding = raw, name, new_stream, padding
        self._stream = new_stream()
        self._is_begun = False  # whether the current stream has had a byte
        self._num_streams = 0
        self._num_zeros = 0  # of padding in a row
        self._left = b""  # compressed bytes behind the end of the last stream
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if self._stream.needs_input:
                chunk = self._without_padding(self._left or self._raw.read(_CHUNK_BYTES))
                self._left = b""
                if chunk is None:
                    continue
                if not chunk:
                    self._check_end()
                    return 0
            else:
                chunk = b""
            self._is_begun = True
            try:
                self._ready = memoryview(self._stream.decompress(chunk, _MOST_BYTES))
            except (OSError, ValueError) as error:  # as bz2's says it; nothing is read here
                raise DamagedStreamError(str(error)) from error
            if self._stream.eof:
                self._left = self._stream.unused_data
                self._stream, self._is_begun = self._new_stream(), False
                self._num_streams += 1
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _without_padding(self, chunk: bytes) -> bytes | None:
        """`chunk` without zeros between streams; None if it was nothing else. Raises: EOFError for half a group."""
        if not self._padding or not self._num_streams or self._is_begun or not chunk:
            return chunk
        rest = chunk.lstrip(b"\0")
        self._num_zeros += len(chunk) - len(rest)
        if not rest:
            return None
        self._check_padding()
        self._num_zeros = 0
        return rest

    def _check_padding(self) -> None:
        if self._padding and self._num_zeros % self._padding:
            raise EOFError(f"{self._num_zeros} zero bytes stand behind {self._name} {self._num_streams - 1}")

    def _check_end(self) -> None:
        if self._is_begun:
            raise EOFError(f"the file ends inside {self._name} {self._num_streams}, counted from 0")
        if not self._num_streams:
            raise EOFError(f"the file is empty and holds no {self._name}")
        self._check_padding()


class _ZstdFrame:
    """One zstd frame; what comes out of a chunk is not limited, but for what `_CHUNK_BYTES` are able to hold."""

    needs_input = True

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).decompressobj()

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        del max_length
        return self._frame.decompress(data)
