"""The files of a token dataset that is still being written: token ids, and the two columns that its index is made of.

Lengths and document sizes go to files as the ids do, so memory does not grow with the dataset. The files are temporary
and removed where the writing ends, or resumable: named `{prefix}.bin.partial`, `.lengths.partial` and
`.documents.partial`, so that a later run finds them, cuts them to what is known to be whole, and goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from megatron3d.errors import DataError, InUseError
from megatron3d.storage.atomic import has_name, is_in_use, open_partial, open_resumable
from megatron3d.storage.durable import flush_to_disk
from megatron3d.storage.refusals import storage_errors

_COLUMN = np.dtype("<i4")
_CHUNK_ENTRIES = 1 << 20
_FLUSH_BYTES = 32 << 20  # of tokens that are written before the disk is asked to store them
_SPILLS = ("lengths", "documents")


@dataclass(frozen=True)
class Extent:
    """How much of a dataset has been written: bytes of tokens, sequences, documents."""

    bin_bytes: int = 0
    num_sequences: int = 0
    num_documents: int = 0


class PartialFiles:
    """Three streams that are written together; `extent` is what was appended to them."""

    def __init__(self, prefix: str, *, is_resumable: bool = False) -> None:
        """Open the files beside `{prefix}.bin`; resumable ones as they are, until `cut` says how much of them counts.

        Raises: StorageError if the place cannot be written; InUseError if another run is writing resumable ones.
        """
        self.prefix, self.extent = prefix, Extent()
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._num_unflushed = 0  # bytes of tokens behind the last time
        self._streams: list[IO[bytes]] = []
        try:
            for ending in ("bin", *_SPILLS):
                self._streams.append(_open(Path(f"{prefix}.{ending}"), is_resumable=is_resumable))
        except BaseException:
            self.close()
            raise
        self.tokens, self._lengths, self._sizes = self._streams

    def cut(self, extent: Extent) -> None:
        """Drop what lies behind `extent`, and append there from now on.

        Raises: DataError if a file is shorter than that.
        """
        ends = (extent.bin_bytes, extent.num_sequences * _COLUMN.itemsize, extent.num_documents * _COLUMN.itemsize)
        for stream, end in zip(self._streams, ends):
            cut_stream(stream, end)
        self.extent = extent

    def append(self, tokens: NDArray, lengths: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        """Append ids, tokens of each sequence, and sequences of each document. Raises: StorageError."""
        with storing(Path(self.tokens.name)):
            self._flush_early(tokens.nbytes)
            self.tokens.write(np.ascontiguousarray(tokens).data)
            self._lengths.write(lengths.astype(_COLUMN).data)
            self._sizes.write(sizes.astype(_COLUMN).data)
        before = self.extent
        self.extent = Extent(
            before.bin_bytes + tokens.nbytes, before.num_sequences + len(lengths), before.num_documents + len(sizes)
        )

    def flush(self) -> None:
        """Wait until all that was appended is on the disk. Raises: StorageError."""
        with storing(Path(self.tokens.name)):
            self._flushed()
            for stream in self._streams:
                flush_to_disk(stream)

    def lengths(self) -> Iterator[NDArray[np.int32]]:
        """The tokens of each sequence, a million at a time; what was appended must have been flushed."""
        return _read(Path(self._lengths.name))

    def sizes(self) -> Iterator[NDArray[np.int32]]:
        """The sequences of each document, likewise."""
        return _read(Path(self._sizes.name))

    def close(self, *, remove: bool = False) -> None:
        """Close the files, and remove them under their partial names.

        Raises: StorageError if what is still buffered cannot be written.
        """
        self._flusher.shutdown(wait=True)
        close_streams(self._streams, Path(f"{self.prefix}.bin"), remove=remove)

    def _flush_early(self, num_bytes: int) -> None:
        """Let a thread wait for the disk from time to time, while more is computed, so that `flush` has little left to
        wait for. Raises: OSError if the disk refused, which the system reports once only."""
        if self._num_unflushed >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            self._flushed()
            self._flushing = self._flusher.submit(os.fdatasync, self.tokens.fileno())
            self._num_unflushed = 0
        self._num_unflushed += num_bytes

    def _flushed(self) -> None:
        """Wait for that thread. Raises: OSError if the disk refused."""
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.result()


def open_exclusively(path: Path) -> IO[bytes]:
    """`open_resumable` with a sentence for what another run has. Raises: InUseError; OSError if the system refuses."""
    try:
        return open_resumable(path)
    except BlockingIOError as error:
        raise InUseError(
            f"{path}.partial is being written by another run; wait for it or choose another --output-prefix."
        ) from error


def cut_stream(stream: IO[bytes], end: int) -> None:
    """Drop what a partial file holds behind byte `end`, and write on from there.

    Raises: DataError if the file is shorter than that; StorageError.
    """
    path = Path(stream.name)
    with storing(path):
        size = path.stat().st_size
        if size >= end:
            stream.truncate(end)
            stream.seek(end)
            return
    raise DataError(
        f"{path} holds {size} bytes, but {end} were on the disk when the run before noted how far it was; run again "
        f"without --resume."
    )


def close_streams(streams: Sequence[IO[bytes]], target: Path, *, remove: bool) -> None:
    """Close partial files that are open, and remove them under their names.

    Raises: StorageError naming `target` if what is still buffered cannot be written.
    """
    with storing(target):
        for stream in streams:
            path = Path(stream.name)
            if stream.closed:
                continue
            if remove and has_name(stream, path):  # and it is not renamed, with another run's file in its place
                path.unlink()
            with suppress(OSError) if remove else nullcontext():  # nobody needs what is still buffered
                stream.close()


def reclaim(prefix: str, extent: Extent) -> bool:
    """Prepare for a resumed run a dataset that an earlier one may have published, in part or wholly; whether wholly.

    The files get their names one after another, the index last. Where the tokens have theirs and the columns are still
    there, the tokens go back to their partial name, so that the rest is done again.

    Raises: InUseError if that run is still at it; StorageError.
    """
    bin_path, partial = Path(f"{prefix}.bin"), Path(f"{prefix}.bin.partial")
    spills = [Path(f"{prefix}.{ending}.partial") for ending in _SPILLS]
    if partial.exists() or not bin_path.exists() or bin_path.stat().st_size != extent.bin_bytes:
        return False
    with storing(bin_path):
        if all(spill.exists() for spill in spills):
            if is_in_use(spills[0]):
                raise InUseError(f"{spills[0]} is being written by another run; wait for it.")
            Path(f"{prefix}.idx").unlink(missing_ok=True)
            bin_path.replace(partial)
            return False
        for spill in spills:
            spill.unlink(missing_ok=True)
    return Path(f"{prefix}.idx").exists()


def partial_paths(prefix: str) -> list[Path]:
    """The names of resumable files."""
    return [Path(f"{prefix}.{ending}.partial") for ending in ("bin", *_SPILLS)]


def storing(path: Path) -> AbstractContextManager[None]:
    """Turns what the system says about `path` into a StorageError."""
    return storage_errors("write", path, way_out="write several smaller files, or elsewhere")


def _open(path: Path, *, is_resumable: bool) -> IO[bytes]:
    if not is_resumable:
        with storing(path):
            return open_partial(path)
    with storing(path):
        return open_exclusively(path)


def _read(path: Path) -> Iterator[NDArray[np.int32]]:
    with open(path, "rb") as stream:
        while len(column := np.fromfile(stream, dtype=_COLUMN, count=_CHUNK_ENTRIES)):
            yield column
