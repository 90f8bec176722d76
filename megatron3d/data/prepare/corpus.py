"""Text corpora as they come: which files, in which format, cut into batches of documents for workers.

Formats by ending: `.jsonl`/`.json` (one JSON object a line, one document an object), `.txt` (the whole file is one
document under the key `text`), `.parquet` (a row is a document); the text formats also with `.gz` or `.zst`. Only a
line feed ends a line, and a byte order mark counts only at the start of a file (`files/text.py`).
Reading stays with one process and costs little; parsing the records is left to whoever gets the batch.
"""

from __future__ import annotations

import codecs
import glob
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron3d.data.prepare.compressed import DAMAGE, decompressed
from megatron3d.data.prepare.spans import InputSpan, Position, whole_files
from megatron3d.errors import ConfigError, DataError, install_extra
from megatron3d.files import json_text
from megatron3d.files.text import TextError, check_encoding, decode

FORMATS = ".jsonl, .json, .txt (each also with .gz or .zst) and .parquet"
_BATCH_BYTES = 1 << 18
_BATCH_RECORDS = 1024


@dataclass(frozen=True)
class RawBatch:
    """Records in a row of one file, not yet parsed: lines of JSON as bytes, or the values of a row by key.

    `path` is the file, or the name of the span; `line_numbers` counts its lines (or rows, or documents) from 1. `end`
    is where the next batch begins. `input_bytes` is how far the reading of all spans has come, in bytes on the disk.
    """

    path: str
    line_numbers: list[int]
    records: list[bytes | dict[str, Any]]
    input_bytes: int
    end: Position


@dataclass(frozen=True)
class Document:
    """The texts of one key of one record: one, or several where the value is a list of sentences (`is_split`)."""

    place: str
    sentences: list[str]
    is_split: bool


def find_inputs(patterns: Sequence[str], *, note: Callable[[str], None]) -> list[Path]:
    """The files that `--input` names, each a path or a glob (whose matches are sorted); a file named again, by
    another spelling or link too, counts once, and `note` takes a line about it.

    Raises: DataError if one names no file; ConfigError for a file of a format that cannot be read.
    """
    files: dict[tuple[int, int], Path] = {}
    for pattern in patterns:
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        found = [Path(match) for match in matches if Path(match).is_file()]
        if not found:
            raise DataError(f"--input {pattern} names no file; give paths or globs of {FORMATS} files.")
        for file in found:
            status = os.stat(file)  # identifies a file by any of its names, hard links too
            first = files.setdefault((status.st_dev, status.st_ino), file)
            if first is not file:
                spelled = f" (as {first})" if first != file else ""
                note(f"--input {pattern}: {file} is named already{spelled}; it is read once, at its first place.")
    for file in files.values():
        if file_kind(file) not in (".jsonl", ".json", ".txt", ".parquet"):
            raise ConfigError(f"--input {file} has an ending that is not known; the formats are {FORMATS}.")
    return list(files.values())


def read_batches(
    spans: Sequence[InputSpan], keys: Sequence[str], *, start: Position | None = None
) -> Iterator[RawBatch]:
    """The records of all spans in order, from `start` on, in batches of about 256 KiB.

    Raises: DataError if a file cannot be decompressed to its end, or read; ConfigError if parquet is not installed.
    """
    start = start or Position(0, 0, spans[0].first if spans else 0)
    bytes_before = 0
    for place, span in enumerate(spans):
        try:
            if place >= start.span:
                begin = start if place == start.span else Position(place, 0, span.first)
                if file_kind(span.file) == ".parquet":
                    yield from _read_parquet(span, keys, begin, bytes_before)
                else:
                    yield from _read_text(span, begin, bytes_before)
            bytes_before += span_bytes(span)
        except DAMAGE as error:
            raise DataError(
                f"{span.file} is damaged or truncated: it cannot be decompressed ({error}). Copy or fetch it again."
            ) from error
        except OSError as error:
            raise DataError(f"{span.file} cannot be read ({error.strerror or error}).") from error


def parse_documents(batch: RawBatch, key: str) -> list[Document]:
    """The documents of `batch` under `key`, in order.

    Raises: DataError naming file and line for a record that is no JSON object, lacks the key, or has something else
    than text (or a list of texts) there.
    """
    places = [f"{batch.path}, line {number}" for number in batch.line_numbers]
    objects = [_parse(record, place) for record, place in zip(batch.records, places)]
    return [
        Document(place, _sentences(values, key, place), is_split=isinstance(values[key], list))
        for values, place in zip(objects, places)
    ]


def iterate_texts(files: Sequence[Path], key: str) -> Iterator[str]:
    """Every text under `key` of all files, in order, parsed here. Raises as the two functions above."""
    for batch in read_batches(whole_files(files), [key]):
        for document in parse_documents(batch, key):
            yield from document.sentences


def file_kind(file: Path) -> str:
    """The ending that says the format, without that of the compression."""
    return (file.suffixes[-2:-1] or [""])[0] if is_compressed(file) else file.suffix


def is_compressed(file: Path) -> bool:
    """Whether the ending is that of a compression."""
    return file.suffix in (".gz", ".zst")


def span_bytes(span: InputSpan) -> int:
    """The bytes on the disk that a span covers; for some of the rows of a parquet file those of the whole file."""
    size = span.file.stat().st_size
    if file_kind(span.file) == ".parquet":
        return size
    return (size if span.end is None else span.end) - span.first


def _read_text(span: InputSpan, begin: Position, bytes_before: int) -> Iterator[RawBatch]:
    """Batches of lines of JSON, or the one document of a text file."""
    with open(span.file, "rb") as raw, decompressed(raw, span.file.suffix) as stream:
        if file_kind(span.file) == ".txt":
            if begin.num_read == 0:
                record = {"text": _decode(stream.read(), str(span.file))}
                input_bytes = bytes_before + span.file.stat().st_size
                yield RawBatch(span.name, [1], [record], input_bytes, Position(begin.span, 1))
            return
        if stream is raw:
            _without_mark(raw.read(4), span.file)  # a span of the middle is of the same encoding
            raw.seek(begin.byte)
        numbers, lines, size = [], [], 0
        disk_bytes = bytes_before - span.first
        end = begin
        for number, line, byte in _numbered_lines(stream, begin if stream is raw else None, span.end):
            if number <= begin.num_read:
                continue
            end = Position(begin.span, number, byte)
            if byte == len(line):
                line = _without_mark(line, span.file)
            if not line.strip():
                continue
            numbers.append(number)
            lines.append(line)
            size += len(line)
            if size >= _BATCH_BYTES or len(lines) >= _BATCH_RECORDS:
                yield RawBatch(span.name, numbers, lines, disk_bytes + raw.tell(), end)
                numbers, lines, size = [], [], 0
        if lines:
            yield RawBatch(span.name, numbers, lines, disk_bytes + raw.tell(), end)


def _numbered_lines(stream: BinaryIO, begin: Position | None, end: int | None) -> Iterator[tuple[int, bytes, int]]:
    """Lines with their number and the byte behind them, counted from `begin` or else the start, up to byte `end`."""
    number, byte = (begin.num_read, begin.byte) if begin else (0, 0)
    for line in stream:
        number += 1
        byte += len(line)
        yield number, line, byte
        if end is not None and byte >= end:
            return


def _read_parquet(span: InputSpan, keys: Sequence[str], begin: Position, bytes_before: int) -> Iterator[RawBatch]:
    """Batches of rows, with the columns `keys` alone."""
    arrow, parquet = _arrow_and_parquet(span.file)
    try:
        table = parquet.ParquetFile(span.file)
        missing = [key for key in keys if key not in table.schema_arrow.names]
        if missing:
            raise DataError(
                f"{span.file} has no column {', '.join(missing)}; its columns are "
                f"{', '.join(table.schema_arrow.names)}, name one with --json-keys."
            )
        total = table.metadata.num_rows
        first, end = span.first + begin.num_read, total if span.end is None else min(span.end, total)
        groups, row = _row_groups(table.metadata, first, end)
        for part in table.iter_batches(batch_size=_BATCH_RECORDS, row_groups=groups, columns=list(keys)):
            before, row = row, row + part.num_rows
            rows = part.slice(max(0, first - before), end - max(first, before)).to_pylist()
            if rows:
                done = max(first, before) + len(rows)
                numbers = list(range(done - len(rows) + 1, done + 1))
                input_bytes = bytes_before + span.file.stat().st_size * done // max(1, total)
                yield RawBatch(span.name, numbers, rows, input_bytes, Position(begin.span, done - span.first))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{span.file} cannot be read as parquet ({error}).") from error


def _row_groups(metadata: Any, first: int, end: int) -> tuple[list[int], int]:
    """The row groups of a parquet file that hold rows `first` up to `end`, and the row with which these begin."""
    groups, begin, row = [], first, 0
    for group in range(metadata.num_row_groups):
        before, row = row, row + metadata.row_group(group).num_rows
        if row > first and before < end:
            begin = before if not groups else begin
            groups.append(group)
    return groups, begin


def _arrow_and_parquet(file: Path) -> tuple[Any, Any]:
    """The modules of pyarrow. Raises: ConfigError if it is not installed."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            f"--input {file} needs the package pyarrow to be read; run: {install_extra('parquet')}"
        ) from error


def _parse(record: bytes | dict[str, Any], place: str) -> dict[str, Any]:
    """The values of a record by key."""
    if isinstance(record, dict):
        return record
    try:
        values = json_text.parse(record)
    except ValueError as error:
        raise DataError(f"{place}: this is no JSON ({error}); each line must hold one JSON object.") from error
    if not isinstance(values, dict):
        raise DataError(f"{place}: this is a JSON {type(values).__name__}; each line must hold one JSON object.")
    return values


def _sentences(values: dict[str, Any], key: str, place: str) -> list[str]:
    """The text or texts under `key`."""
    if key not in values:
        raise DataError(f"{place}: there is no key {key!r}, only {', '.join(values)}; name one with --json-keys.")
    value = values[key]
    sentences = value if isinstance(value, list) else [value]
    if not all(isinstance(sentence, str) for sentence in sentences):
        raise DataError(f"{place}: {key!r} is {value!r:.40}, not a text or a list of texts.")
    for sentence in sentences:
        _check_unicode(sentence, place)
    return sentences


def _check_unicode(text: str, place: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: character {error.start} is {text[error.start]!a}, half of a surrogate pair; remove it."
        ) from error


def _without_mark(line: bytes, file: Path) -> bytes:
    """The first line of a file without its byte order mark. Raises: DataError for the mark of another encoding."""
    try:
        check_encoding(line[:4])
    except TextError as error:
        raise DataError(f"{file} cannot be read as text: {error}.") from error
    return line.removeprefix(codecs.BOM_UTF8)


def _decode(content: bytes, place: str) -> str:
    """The text of a whole file."""
    try:
        return decode(content)
    except TextError as error:
        raise DataError(f"{place} cannot be read as text: {error}.") from error
