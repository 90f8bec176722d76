"""Text corpora as they come, cut into batches of records for workers.

Only a line feed ends a line, and a byte order mark counts only at the start of a file (`files/text.py`). Reading stays
with one process and costs little; splitting lines (`lines.py`) and parsing records (`records.py`) are left to whoever
gets the batch. Which files there are: `inputs.py`. What is wrong with a file as a whole is raised here; what is wrong
with a record never is.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from megatron3d.data.prepare.columns import count_rows, read_rows
from megatron3d.data.prepare.compressed import DAMAGE, decompressed
from megatron3d.data.prepare.inputs import COLUMN_KINDS, STANDARD_INPUT, file_kind, is_compressed
from megatron3d.data.prepare.lines import FileRange, LineBlock, as_records, changed, cut_lines, skip_line, too_long
from megatron3d.data.prepare.records import RawBatch, parse_documents
from megatron3d.data.prepare.rejects import MAX_LINE_BYTES, BadRecordLimits, RejectTally
from megatron3d.data.prepare.spans import InputSpan, Position, whole_files
from megatron3d.errors import DataError
from megatron3d.files.text import TextError, check_encoding

_Batch = RawBatch | LineBlock


@dataclass(frozen=True)
class _LineOptions:
    """How lines are read: up to which length, and whether the bytes of plain files are left to who parses them."""

    max_line_bytes: int
    by_range: bool


def read_batches(
    spans: Sequence[InputSpan],
    keys: Sequence[str],
    *,
    start: Position | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[RawBatch]:
    """The records of all spans in order, from `start` on, in batches of about 1 MiB that have at least one.

    A line of more than `max_line_bytes`, its end not counted, is read over and comes as an `Unreadable`.

    Raises: DataError if a file cannot be decompressed to its end, or read; ConfigError if pyarrow is not installed.
    """
    for block in read_blocks(spans, keys, start=start, max_line_bytes=max_line_bytes):
        if (batch := as_records(block)).records:
            yield batch


def read_blocks(
    spans: Sequence[InputSpan],
    keys: Sequence[str],
    *,
    start: Position | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    by_range: bool = False,
) -> Iterator[RawBatch | LineBlock]:
    """What `read_batches` reads, with lines not yet split, for other processes to do so: `lines.as_records`.

    With `by_range` blocks of plain files are places in them, for processes that see the same files.

    Raises: as `read_batches`.
    """
    options = _LineOptions(max_line_bytes, by_range)
    start = start or Position(0, 0, spans[0].first if spans else 0)
    bytes_before = 0
    for place, span in enumerate(spans):
        try:
            size = span_bytes(span)
            if place >= start.span:
                begin = start if place == start.span else Position(place, 0, span.first)
                if file_kind(span.file) in COLUMN_KINDS:
                    yield from _read_columns(span, keys, begin, bytes_before)
                elif file_kind(span.file) == ".txt":
                    yield from _read_document(span, begin, bytes_before)
                else:
                    yield from _read_lines(span, begin, bytes_before, options)
        except DAMAGE as error:
            raise DataError(
                f"{span.file} is damaged or truncated: it cannot be decompressed ({error}). Copy or fetch it again."
            ) from error
        except OSError as error:
            raise DataError(f"{span.file} cannot be read ({error.strerror or error}).") from error
        bytes_before += size


def span_bytes(span: InputSpan) -> int:
    """The bytes on the disk that a span covers; for some of the rows of a file of columns those of the whole file, and
    0 for standard input, whose end is not known.

    Raises: OSError if the file is gone.
    """
    if span.file == STANDARD_INPUT:
        return 0
    size = span.file.stat().st_size
    if file_kind(span.file) in COLUMN_KINDS:
        return size
    return (size if span.end is None else span.end) - span.first


def check_position(spans: Sequence[InputSpan], position: Position) -> None:
    """Compare a position that was read from a file with the input, as far as that can be seen without reading it all.

    Raises: ValueError, whose message is a clause, if no record can begin there; OSError if the input cannot be read;
    ConfigError if pyarrow is not installed.
    """
    if position.span >= len(spans):
        raise ValueError(f"it stands in part {position.span} of the input, counted from 0, which has {len(spans)}")
    span, file = spans[position.span], spans[position.span].file
    if file_kind(file) == ".parquet":
        num_rows = (count_rows(file) if span.end is None else span.end) - span.first
        if position.num_read > num_rows:
            raise ValueError(f"it stands behind row {position.num_read} of {file}, of which {num_rows} are read")
    elif file_kind(file) in (".jsonl", ".json") and not is_compressed(file):
        size = file.stat().st_size
        end = size if span.end is None else span.end
        if not span.first <= position.byte <= end:
            raise ValueError(f"it stands at byte {position.byte} of {file}, of which {span.first} to {end} are read")
        if position.byte not in (span.first, size):
            with open(file, "rb") as stream:
                stream.seek(position.byte - 1)
                if stream.read(1) != b"\n":
                    raise ValueError(f"it stands at byte {position.byte} of {file}, where no line begins")


def iterate_texts(
    files: Sequence[Path],
    key: str,
    *,
    limits: BadRecordLimits | None = None,
    note: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Every text under `key` of all files, in order, parsed here; `note` takes a line about rejected records.

    Raises: DataError as `read_batches`, and for more bad records than `limits` (by default the default ones) allow.
    """
    limits = limits or BadRecordLimits()
    tally = RejectTally(limits)
    for batch in read_batches(whole_files(files), [key], max_line_bytes=limits.max_line_bytes):
        parsed = parse_documents(batch, [key])
        tally.add(len(batch.records), parsed.rejects)
        for document in parsed.documents[0]:
            yield from document.sentences
    tally.finish()
    if note is not None and tally.num_rejected:
        note(f"{tally.summary}; the first: {tally.first_message}")


@contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The bytes of a file as they are on the disk, and the same decompressed; standard input stays open."""
    if file == STANDARD_INPUT:
        if sys.stdin is None:  # the caller closed it
            raise DataError("--input -: standard input is closed; pipe lines of JSON into the command.")
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    with open(file, "rb") as raw, decompressed(raw, file.suffix) as stream:
        yield raw, stream


def _read_document(span: InputSpan, begin: Position, bytes_before: int) -> Iterator[RawBatch]:
    """The one document of a text file."""
    if begin.num_read:
        return
    with _opened(span.file) as (raw, stream):
        content = _without_mark(stream.read(), span.file)
        yield RawBatch(span.name, [1], [{"text": content}], bytes_before + raw.tell(), Position(begin.span, 1))


def _read_lines(span: InputSpan, begin: Position, bytes_before: int, options: _LineOptions) -> Iterator[_Batch]:
    """Blocks of lines of JSON."""
    with _opened(span.file) as (raw, stream):
        is_plain = stream is raw and span.file != STANDARD_INPUT
        if is_plain:
            _without_mark(raw.read(4), span.file)  # a span of the middle is of the same encoding
            raw.seek(begin.byte)
        else:
            begin = replace(begin, byte=sum(skip_line(stream) for _ in range(begin.num_read)))
        by_range, limit, behind = is_plain and options.by_range, options.max_line_bytes, begin.byte
        expected_end = span.end if span.end is not None else os.fstat(raw.fileno()).st_size if is_plain else 0
        for cut in cut_lines(stream, begin, end=span.end, max_line_bytes=limit, with_content=not by_range):
            done = cut.end - span.first if is_plain else 0 if span.file == STANDARD_INPUT else raw.tell()
            behind = cut.end
            end = Position(begin.span, cut.lines_before + cut.num_lines, behind)
            if cut.is_too_long:
                record = too_long(cut.end - cut.first, limit, cut.content or b"")
                yield RawBatch(span.name, [cut.lines_before + 1], [record], bytes_before + done, end)
                continue
            if cut.first == 0 and cut.content:
                _without_mark(cut.content[:4], span.file)
            yield LineBlock(
                span.name,
                FileRange(span.file, cut.first, cut.end) if cut.content is None else cut.content,
                cut.lines_before,
                cut.num_lines,
                cut.first == 0,
                limit,
                bytes_before + done,
                end,
            )
        if behind < expected_end:
            raise changed(span.file)


def _read_columns(span: InputSpan, keys: Sequence[str], begin: Position, bytes_before: int) -> Iterator[RawBatch]:
    """Batches of rows, numbered as in the file."""
    size = span_bytes(span)
    for rows, row, share in read_rows(span.file, keys, first=span.first + begin.num_read, end=span.end):
        numbers, end = [*range(row - len(rows) + 1, row + 1)], Position(begin.span, row - span.first)
        yield RawBatch(span.name, numbers, [*rows], bytes_before + int(size * share), end)


def _without_mark(start: bytes, file: Path) -> bytes:
    """The beginning of a file without its byte order mark. Raises: DataError for the mark of another encoding."""
    try:
        check_encoding(start[:4])
    except TextError as error:
        raise DataError(f"{file} cannot be read as text: {error}.") from error
    return start.removeprefix(codecs.BOM_UTF8)
