"""Token files: `{prefix}.bin` holds token ids and nothing else, `{prefix}.idx` says where each sequence lies in it.

The layout is that of Megatron-LM, so files go both ways. All little-endian:

    bytes 0-8    the letters MMIDIDX and two zero bytes
    bytes 9-16   version, uint64, 1
    byte  17     dtype code of the tokens, see DTYPE_OF_CODE
    bytes 18-25  S, number of sequences, uint64
    bytes 26-33  D, number of document bounds, uint64: documents + 1
    then         int32[S] lengths in tokens, int64[S] byte offsets into .bin, int64[D] document bounds in sequences,
                 and in multimodal files int8[S] modes; no padding anywhere

A document is one or more sequences (its sentences) in a row. Everything is checked against the file lengths when the
files are opened. Token ids are read and not mapped, because a mapped file that is cut short later kills the process
with SIGBUS. An index is read whole up to LARGEST_INDEX_READ; a larger one is mapped, so that the processes of a machine
share its memory, and there the danger stays.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron3d.data.partial_files import PartialFiles, storing
from megatron3d.data.token_file import TokenFile
from megatron3d.errors import DataError
from megatron3d.storage.atomic import open_partial
from megatron3d.storage.durable import flush_to_disk

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPE_OF_CODE = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
LARGEST_INDEX_READ = 256 << 20  # bytes; about 20 million sequences
_DOCUMENTS_PER_COPY = 4096
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}


def token_dtype(vocab_size: int | None) -> np.dtype:
    """uint16 where the ids of the vocabulary fit (under 65,500, Megatron-LM's bound), else int32."""
    return np.dtype("<u2") if vocab_size is not None and vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """One token file, open for reading from any thread; `d[i]` is sequence i.

    lengths: int32[S], tokens of each sequence. document_bounds: int64[D]; document k is the sequences
    `document_bounds[k] .. document_bounds[k+1]-1`. dtype: of the stored ids. modes: int8[S] or None.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open `{prefix}.bin` and read `{prefix}.idx`.

        Raises: DataError naming the file, if one is missing, is not of this format, or is shorter or longer than
        its header says, if an offset, length or document bound points outside, or if offsets and lengths disagree.
        """
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        check_files_exist(self.prefix)
        self.dtype, num_sequences, num_bounds, has_modes = _read_header(self.idx_path)
        index = _index_bytes(self.idx_path)
        self.lengths, end = _array_of(index, HEADER_BYTES, "<i4", num_sequences)
        self.offsets, end = _array_of(index, end, "<i8", num_sequences)
        self.document_bounds, end = _array_of(index, end, "<i8", num_bounds)
        self.modes = _array_of(index, end, "<i1", num_sequences)[0] if has_modes else None
        self._tokens = TokenFile(self.bin_path)
        self._check_index(self._tokens.size_bytes)

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """The number of documents."""
        return len(self.document_bounds) - 1

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    def __getitem__(self, index: int) -> NDArray:
        """The tokens of sequence `index`; negative numbers count from the end.

        Raises: IndexError outside the dataset; DataError if the file was cut short since it was opened.
        """
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray:
        """`length` tokens (default: the rest) of sequence `index` from token `offset` on, in an array of their own.

        Raises: IndexError if the sequence or the part of it does not exist; DataError if the file was cut short since
        it was opened.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.prefix}")
        available = int(self.lengths[index])
        length = available - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > available:
            raise IndexError(f"tokens {offset}..{offset + length} of {available} in sequence {index} of {self.prefix}")
        first_byte = int(self.offsets[index]) + offset * self.dtype.itemsize
        return self._tokens.read(first_byte, length, self.dtype)

    def read_at(self, offset: int, count: int) -> NDArray:
        """`count` tokens from byte `offset` of .bin on, across sequences that follow each other in the file.

        Raises: DataError if the file was cut short since it was opened.
        """
        return self._tokens.read(offset, count, self.dtype)

    def document(self, number: int) -> NDArray:
        """The tokens of all sequences of document `number`, copied into one array."""
        first, last = int(self.document_bounds[number]), int(self.document_bounds[number + 1])
        parts = [self.get(sequence) for sequence in range(first, last)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def _check_index(self, bin_bytes: int) -> None:
        """Compare the arrays of the index with each other and with the length of .bin; Raises: DataError."""
        if len(self) and int(self.lengths.min()) < 0:
            bad = int(np.argmax(self.lengths < 0))
            raise DataError(f"{self.idx_path} is damaged: sequence {bad} has the length {self.lengths[bad]}.")
        bounds = self.document_bounds
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != len(self) or (np.diff(bounds) < 0).any():
            ends = f"{bounds[0]} to {bounds[-1]}" if len(bounds) else "nothing"
            raise DataError(
                f"{self.idx_path} is damaged: its {len(bounds)} document bounds run from {ends}; they must rise from 0 "
                f"to the number of sequences, {len(self)}. Run tools/preprocess_data.py again."
            )
        ends_bytes = self.offsets + self.lengths.astype(np.int64) * self.dtype.itemsize
        outside = (self.offsets < 0) | (ends_bytes > bin_bytes)
        if outside.any():
            bad = int(np.argmax(outside))
            raise DataError(
                f"{self.bin_path} holds {bin_bytes} bytes, but {self.idx_path} places sequence {bad} of {len(self)} at "
                f"bytes {self.offsets[bad]} to {ends_bytes[bad]} and the last byte at {ends_bytes.max()}: the file is "
                f"truncated or belongs to another index. Copy or preprocess it again."
            )
        if (misplaced := _misplaced(self.offsets, ends_bytes)) is not None:
            bad, due = misplaced
            raise DataError(
                f"{self.idx_path} contradicts itself: sequence {bad} of {len(self)} begins at byte {self.offsets[bad]} "
                f"of .bin, but by their lengths the sequences before it end at byte {due}. Copy or preprocess it again."
            )
        needed = int(ends_bytes.max()) if len(self) else 0
        if bin_bytes > needed:
            raise DataError(
                f"{self.bin_path} holds {bin_bytes} bytes, but {self.idx_path} accounts for the first {needed}: bytes "
                f"{needed} to {bin_bytes} belong to no sequence. The two files are not of one run; preprocess again."
            )


class IndexedDatasetWriter:
    """Writes `{prefix}.bin` and `{prefix}.idx` so that they appear together, whole, or not at all.

    Used as a context manager: leaving it normally publishes the files, an exception removes what was written. Memory
    does not grow with the dataset.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, *, files: PartialFiles | None = None) -> None:
        """Open temporary files beside the target, unless it writes to `files`.

        Raises: StorageError if the place cannot be written.
        """
        self.prefix, self.dtype = str(prefix), np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODE_OF_DTYPE:
            raise ValueError(f"{dtype} has no code in the format; it has {[str(d) for d in CODE_OF_DTYPE]}")
        self.files = files or PartialFiles(self.prefix)

    def __enter__(self) -> IndexedDatasetWriter:
        """The writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Publish, or after an exception remove the temporary files."""
        try:
            if kind is None:
                self.publish()
        finally:
            self.files.close(remove=True)

    def add_document(self, tokens: NDArray | list[int], sequence_lengths: list[int] | None = None) -> None:
        """Append one document of `tokens`, one sequence unless `sequence_lengths` cuts it into several."""
        lengths = [len(tokens)] if sequence_lengths is None else sequence_lengths
        self.add_documents(np.asarray(tokens, dtype=np.int64), lengths, [len(lengths)])

    def add_documents(
        self, tokens: NDArray, sequence_lengths: NDArray | list[int], sequences_per_document: NDArray | list[int]
    ) -> None:
        """Append many documents at once: their tokens in a row, and how to cut them.

        Raises: ValueError if the numbers disagree or an id does not fit the dtype; StorageError if the disk refuses.
        """
        lengths = np.asarray(sequence_lengths, dtype=np.int64)
        sizes = np.asarray(sequences_per_document, dtype=np.int64)
        if lengths.sum() != len(tokens) or sizes.sum() != len(lengths):
            raise ValueError(
                f"{len(tokens)} tokens but sequences of {lengths.sum()}; {len(lengths)} sequences but documents of "
                f"{sizes.sum()}"
            )
        if len(lengths) and lengths.max() >= 2**31:
            raise DataError(
                f"a sequence of {lengths.max()} tokens for {self.prefix} is over 2**31 - 1; cut the document."
            )
        if len(tokens) and self.dtype.kind in "iu" and tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype.str)
            if tokens.min() < limits.min or tokens.max() > limits.max:
                raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype} of {self.prefix}")
        self.files.append(np.asarray(tokens, dtype=self.dtype), lengths, sizes)

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of another dataset of the same dtype, in order."""
        if dataset.dtype != self.dtype:
            raise ValueError(f"{dataset.prefix} holds {dataset.dtype}, {self.prefix} holds {self.dtype}")
        bounds = dataset.document_bounds
        for first in range(0, dataset.num_documents, _DOCUMENTS_PER_COPY):
            last = min(first + _DOCUMENTS_PER_COPY, dataset.num_documents)
            sequences = range(int(bounds[first]), int(bounds[last]))
            lengths = dataset.lengths[sequences.start : sequences.stop]
            tokens = _tokens_in_a_row(dataset, sequences)
            self.add_documents(tokens, lengths, np.diff(bounds[first : last + 1]))

    def publish(self) -> None:
        """Write the index, force both files to the disk and give them their names, the index last.

        Raises: StorageError if the disk refuses.
        """
        idx_path, bin_path = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        self.files.flush()
        with storing(idx_path):
            idx = open_partial(idx_path)
            try:
                self._write_index(idx)
                flush_to_disk(idx)
                # an index of an earlier run must never stand beside the new tokens
                idx_path.unlink(missing_ok=True)
                Path(self.files.tokens.name).replace(bin_path)
                Path(idx.name).replace(idx_path)
            finally:
                idx.close()
                Path(idx.name).unlink(missing_ok=True)
        self.files.close(remove=True)

    def _write_index(self, idx: IO[bytes]) -> None:
        """The index in its order, from the columns of lengths and document sizes, a million entries at a time."""
        extent, code = self.files.extent, CODE_OF_DTYPE[self.dtype]
        idx.write(struct.pack("<9sQBQQ", MAGIC, VERSION, code, extent.num_sequences, extent.num_documents + 1))
        for lengths in self.files.lengths():
            idx.write(lengths.astype("<i4").data)
        end = 0
        for lengths in self.files.lengths():
            ends = end + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            idx.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8").data)
            end = int(ends[-1])
        bound = 0
        idx.write(struct.pack("<q", bound))
        for sizes in self.files.sizes():
            bounds = bound + np.cumsum(sizes, dtype=np.int64)
            idx.write(bounds.astype("<i8").data)
            bound = int(bounds[-1])


def _tokens_in_a_row(dataset: IndexedDataset, sequences: range) -> NDArray:
    """The tokens of `sequences`: one read where they follow each other in the file, as they do as a rule."""
    if not sequences:
        return np.empty(0, dtype=dataset.dtype)
    lengths, offsets = (column[sequences.start : sequences.stop] for column in (dataset.lengths, dataset.offsets))
    ends = offsets + lengths.astype(np.int64) * dataset.dtype.itemsize
    if np.array_equal(offsets[1:], ends[:-1]):
        return dataset.read_at(int(offsets[0]), int(lengths.sum(dtype=np.int64)))
    return np.concatenate([dataset.get(sequence) for sequence in sequences])


def _misplaced(offsets: NDArray[np.int64], ends: NDArray[np.int64]) -> tuple[int, int] | None:
    """A sequence that does not begin where the one before it in the file ends, and where that is; None if all do.

    Sequences lie one behind the other, as a rule in the order of the index, and together they are the file. Where
    offsets and lengths say something else, tokens would be read twice or never, as parts of sequences nobody wrote.
    """
    if len(offsets) == 0 or (offsets[0] == 0 and np.array_equal(offsets[1:], ends[:-1])):
        return None
    order = np.lexsort((ends, offsets))
    due = np.concatenate([np.zeros(1, dtype=np.int64), ends[order[:-1]]])
    is_wrong = offsets[order] != due
    if not is_wrong.any():
        return None
    place = int(np.argmax(is_wrong))
    return int(order[place]), int(due[place])


def index_bytes(num_sequences: int, num_documents: int) -> int:
    """The size of an index without modes."""
    return HEADER_BYTES + 12 * num_sequences + 8 * (num_documents + 1)


def check_files_exist(prefix: str) -> None:
    """Raises: DataError naming the missing file, and the prefix where an ending was given with it."""
    missing = [f"{prefix}{ending}" for ending in (".bin", ".idx") if not Path(f"{prefix}{ending}").is_file()]
    if not missing:
        return
    ending = Path(prefix).suffix
    if ending in (".bin", ".idx"):
        advice = f"give the prefix without the ending: {prefix.removesuffix(ending)}"
    else:
        advice = "give the prefix that tools/preprocess_data.py wrote, with the key and level: PREFIX_text_document"
    raise DataError(f"The data path {prefix} needs {' and '.join(missing)}, which cannot be found; {advice}.")


def _read_header(path: Path) -> tuple[np.dtype, int, int, bool]:
    """Dtype, number of sequences, number of document bounds, and whether modes follow. Raises: DataError."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        header = stream.read(HEADER_BYTES)
    if header[:9] != MAGIC:
        raise DataError(
            f"{path} is no token index: its bytes 0 to 9 are {header[:9]!r}, not {MAGIC!r}. Make it with "
            f"tools/preprocess_data.py."
        )
    if size < HEADER_BYTES:
        raise DataError(f"{path} is truncated: its header takes bytes 0 to {HEADER_BYTES}, the file ends at {size}.")
    _, version, code, num_sequences, num_bounds = struct.unpack("<9sQBQQ", header)
    if version != VERSION:
        raise DataError(f"{path} has format version {version} in bytes 9 to 17; version {VERSION} can be read.")
    if code not in DTYPE_OF_CODE:
        raise DataError(f"{path} has the dtype code {code} in byte 17; the codes are 1 to {max(DTYPE_OF_CODE)}.")
    if DTYPE_OF_CODE[code].kind == "f":
        raise DataError(f"{path} stores {DTYPE_OF_CODE[code].name} numbers (dtype code {code}), not token ids.")
    expected = index_bytes(num_sequences, num_bounds - 1)
    if size not in (expected, expected + num_sequences):
        raise DataError(
            f"{path} is {size} bytes long, but with {num_sequences} sequences and {num_bounds} document bounds it "
            f"takes bytes 0 to {expected}: it is {'truncated' if size < expected else 'longer than it says'}. Copy or "
            f"preprocess it again."
        )
    return DTYPE_OF_CODE[code], num_sequences, num_bounds, size == expected + num_sequences and num_sequences > 0


def _index_bytes(path: Path) -> NDArray[np.uint8]:
    """The bytes of an index: its own copy, or a map of a large one. Raises: DataError if it shrinks meanwhile."""
    file = TokenFile(path)
    if file.size_bytes > LARGEST_INDEX_READ:
        return np.memmap(path, dtype=np.uint8, mode="r")
    index = file.read(0, file.size_bytes, np.uint8)
    index.flags.writeable = False
    return index


def _array_of(index: NDArray[np.uint8], start: int, dtype: str, count: int) -> tuple[NDArray, int]:
    """`count` numbers of the index from byte `start` on, and the byte after them."""
    end = start + count * np.dtype(dtype).itemsize
    return np.frombuffer(index, dtype=dtype, count=count, offset=start), end
