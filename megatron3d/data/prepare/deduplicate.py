"""A corpus without its duplicates: records read as `preprocess` reads them, and those that stay written as they were.

One process reads in order; the memory is that of the finder (`duplicates.py`) and of a place for each kept record.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import zstandard

from megatron3d.data.prepare.corpus import read_batches, span_bytes
from megatron3d.data.prepare.duplicates import Duplicate, DuplicateFinder, NearRule
from megatron3d.data.prepare.inputs import STANDARD_INPUT
from megatron3d.data.prepare.records import RawBatch, parse_documents
from megatron3d.data.prepare.rejects import BadRecordLimits, RejectsFile, RejectTally
from megatron3d.data.prepare.spans import whole_files
from megatron3d.errors import ConfigError, DataError
from megatron3d.storage.atomic import open_partial
from megatron3d.storage.durable import flush_to_disk
from megatron3d.storage.refusals import storage_errors

OUTPUT_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class DeduplicateRequest:
    """What is dropped: `exact` duplicates, near ones by `near`, and texts of fewer or more characters.

    `key` is the text that counts; `columns` are other columns of parquet and Arrow files that stay in the records,
    which of lines of JSON are kept whole.
    """

    key: str = "text"
    exact: bool = True
    near: NearRule | None = None
    min_chars: int = 0
    max_chars: int | None = None
    columns: tuple[str, ...] = ()
    limits: BadRecordLimits = field(default_factory=BadRecordLimits)


@dataclass
class DeduplicateCounts:
    """Records so far. `input_share` is the part of the input that was read, None with standard input."""

    kept: int = 0
    exact: int = 0
    near: int = 0
    short: int = 0
    long: int = 0
    text_bytes: int = 0
    input_share: float | None = None
    elapsed_s: float = 0.0
    rejected: str = ""

    @property
    def records(self) -> int:
        """All that are no bad records."""
        return self.kept + self.exact + self.near + self.short + self.long


def duplicates_path(output: Path) -> Path:
    """The file that lists what was dropped as a duplicate."""
    return output.with_name(f"{_stem(output)}_duplicates.jsonl")


def rejects_path(output: Path) -> Path:
    """The file that lists bad records."""
    return output.with_name(f"{_stem(output)}_rejects.jsonl")


def deduplicate(
    files: Sequence[Path],
    output: Path,
    request: DeduplicateRequest,
    *,
    report: Callable[[DeduplicateCounts], None] = lambda counts: None,
) -> DeduplicateCounts:
    """Write the records that stay to `output`, in their order, and the dropped ones to `duplicates_path`.

    `report` is called after each batch. The files appear whole or not at all, `output` last.

    Raises: ConfigError for an output that is an input or of another format, or a package that is not installed;
    DataError for input that cannot be read or has too many bad records; StorageError.
    """
    _check_output(files, output)
    finder, counts, tally = (
        DuplicateFinder(exact=request.exact, near=request.near),
        DeduplicateCounts(),
        RejectTally(request.limits),
    )
    spans = whole_files(files)
    total = None if STANDARD_INPUT in files else sum(map(span_bytes, spans))
    places: list[tuple[str, int]] = []  # of the kept records, by the number that the finder knows
    start_s = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(storage_errors("write", output, way_out="give another --output"))
        kept = stack.enter_context(_published(output))
        dropped = stack.enter_context(_published(duplicates_path(output)))
        rejects = stack.enter_context(_rejects(rejects_path(output)))
        keys = [request.key, *request.columns]
        for batch in read_batches(spans, keys, max_line_bytes=request.limits.max_line_bytes):
            parsed = parse_documents(batch, [request.key])
            tally.add(len(batch.records), parsed.rejects)
            rejects.add(parsed.rejects)
            bad = {reject.line for reject in parsed.rejects}
            documents = iter(parsed.documents[0])
            for number, record in zip(batch.line_numbers, batch.records):
                if number in bad:
                    continue
                text = "\n".join(next(documents).sentences)
                counts.text_bytes += len(text.encode())
                if _is_of_wrong_length(text, request, counts):
                    continue
                found = finder.add(text)
                if found is None:
                    places.append((batch.path, number))
                    counts.kept += 1
                    kept.write(_line(record))
                else:
                    counts.exact, counts.near = counts.exact + found.is_exact, counts.near + (not found.is_exact)
                    dropped.write(_report_line(batch, number, places[found.of], found))
            counts.input_share = None if total is None else batch.input_bytes / max(total, 1)
            counts.elapsed_s = time.monotonic() - start_s
            report(counts)
        tally.finish()
        if not tally.num_records:
            raise DataError(f"{', '.join(map(str, files))}: there is no record in the input; nothing was written.")
    counts.rejected = tally.summary if tally.num_rejected else ""
    return counts


def _is_of_wrong_length(text: str, request: DeduplicateRequest, counts: DeduplicateCounts) -> bool:
    """Whether a text is too short or too long, and is then counted."""
    is_short = len(text) < request.min_chars
    is_long = request.max_chars is not None and len(text) > request.max_chars
    counts.short, counts.long = counts.short + is_short, counts.long + is_long
    return is_short or is_long


def _check_output(files: Sequence[Path], output: Path) -> None:
    if not output.name.endswith(OUTPUT_ENDINGS):
        raise ConfigError(f"--output {output} has an ending that is not known; it can be {', '.join(OUTPUT_ENDINGS)}.")
    written = [path for path in (output, duplicates_path(output), rejects_path(output)) if os.path.exists(path)]
    for file in files:
        if file != STANDARD_INPUT and any(path.samefile(file) for path in written):
            raise ConfigError(f"--output {output} would replace the input {file}; choose another name.")


def _stem(output: Path) -> str:
    return output.name[: output.name.rindex(".jsonl")]


@contextmanager
def _published(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content, compressed by the ending, gets the name `path` where the block ends well."""
    with open_partial(path) as stream:
        try:
            with _compressed(stream, path.suffix) as content:
                yield content
            flush_to_disk(stream)
            Path(stream.name).replace(path)
        finally:
            Path(stream.name).unlink(missing_ok=True)


@contextmanager
def _compressed(stream: IO[bytes], suffix: str) -> Iterator[BinaryIO]:
    if suffix == ".gz":
        with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as content:
            yield cast(BinaryIO, content)
    elif suffix == ".zst":
        with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as content:
            yield cast(BinaryIO, content)
    else:
        yield cast(BinaryIO, stream)


@contextmanager
def _rejects(path: Path) -> Iterator[RejectsFile]:
    rejects = RejectsFile(path)
    try:
        rejects.cut(0)
        yield rejects
        rejects.publish()
    except BaseException:
        rejects.close(remove=True)
        raise


def _line(record: Any) -> bytes:
    """A record as a line: as it was read, or of columns as an object; what JSON has no form for as its text."""
    if isinstance(record, bytes):
        return record.removesuffix(b"\n").removesuffix(b"\r") + b"\n"
    return (json.dumps(record, ensure_ascii=False, default=_text) + "\n").encode()


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _report_line(batch: RawBatch, number: int, kept: tuple[str, int], found: Duplicate) -> bytes:
    file, line = kept
    facts = {
        "file": batch.path,
        "line": number,
        "kind": "exact" if found.is_exact else "near",
        "similarity": round(found.similarity, 4),
        "kept_file": file,
        "kept_line": line,
    }
    return (json.dumps(facts, ensure_ascii=False) + "\n").encode()
