"""Rows of `.parquet` and `.arrow` files, which need pyarrow: the columns of the keys alone, a batch of rows at a time.

Texts stay bytes until somebody parses the record (`records.py`), so that one that is not UTF-8 is one bad record and
not a damaged file. `.arrow` is what Hugging Face's datasets save, Arrow's format of a stream, or that of a file.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron3d.errors import ConfigError, DataError, install_extra

_ROWS = 1024
_Part = tuple[Any, int, float]  # a record batch, the number of its first row, and which part of the file was read
# What pyarrow raises of Python's own: for names of columns that are no text, lengths beyond the memory, and the like.
_DAMAGE = (OSError, ValueError, KeyError, MemoryError)
_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # the mark of a message, and its length of 0


def read_rows(
    file: Path, keys: Sequence[str], *, first: int = 0, end: int | None = None
) -> Iterator[tuple[list[dict[str, Any]], int, float]]:
    """Rows `first` up to `end` (None: the last) of `file`, by the names of the columns that `keys` need.

    With each list of rows comes the number of the row behind them, and which part of the file was read, 0 to 1.

    Raises: DataError if the file is damaged or truncated, or lacks a column; ConfigError if pyarrow is not installed.
    """
    arrow, module = _modules(file)
    read = _read_parquet if file.suffix == ".parquet" else _read_arrow
    try:
        for batch, row, share in read(arrow, module, file, keys, first):
            wanted = batch.slice(max(0, first - row), None if end is None else max(0, end - max(first, row)))
            if wanted.num_rows:
                yield _plain_rows(arrow, wanted), max(first, row) + wanted.num_rows, share
            if end is not None and row + batch.num_rows >= end:
                return
    except (arrow.ArrowException, *_DAMAGE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file} cannot be read as {file.suffix.removeprefix('.')} ({reason}).") from error


def count_rows(file: Path) -> int:
    """The rows of a parquet file. Raises: DataError if it is damaged; ConfigError if pyarrow is not installed."""
    arrow, parquet = _modules(file)
    try:
        return parquet.read_metadata(file).num_rows
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet ({error}).") from error


def _modules(file: Path) -> tuple[Any, Any]:
    """pyarrow, and its module for the kind of file. Raises: ConfigError if it is not installed."""
    try:
        arrow = importlib.import_module("pyarrow")
        return arrow, importlib.import_module("pyarrow.parquet" if file.suffix == ".parquet" else "pyarrow.ipc")
    except ImportError as error:
        raise ConfigError(
            f"--input {file} needs the package pyarrow to be read; run: {install_extra('parquet')}"
        ) from error


def _read_parquet(arrow: Any, parquet: Any, file: Path, keys: Sequence[str], first: int) -> Iterator[_Part]:
    """Record batches of a parquet file, from the group of rows on that has row `first`."""
    with parquet.ParquetFile(file) as table:
        columns = _columns_of(file, table.schema_arrow.names, keys)
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        row, group = 0, 0
        while group < len(sizes) and row + sizes[group] <= first:
            row, group = row + sizes[group], group + 1
        groups = list(range(group, len(sizes)))
        for batch in table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=columns):
            yield batch, row, (row + batch.num_rows) / sum(sizes)
            row += batch.num_rows


def _read_arrow(arrow: Any, ipc: Any, file: Path, keys: Sequence[str], first: int) -> Iterator[_Part]:
    """Record batches of Arrow's stream or file; not mapped, since a file that shrinks would end the process."""
    del first  # rows are in no index; those before it are passed over
    row = 0
    with ExitStack() as stack:
        raw = stack.enter_context(open(file, "rb"))
        is_file = raw.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        if not is_file:
            _check_end_of_stream(raw, file)
        raw.seek(0)
        size = max(1, os.fstat(raw.fileno()).st_size)
        source = stack.enter_context(arrow.PythonFile(raw, mode="r"))
        reader = stack.enter_context((ipc.open_file if is_file else ipc.open_stream)(source))
        columns = _columns_of(file, reader.schema.names, keys)
        parts = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        for part in parts:
            chosen = part.select(columns)
            chosen.validate()
            for start in range(0, chosen.num_rows, _ROWS):
                batch = chosen.slice(start, _ROWS)
                yield batch, row, raw.tell() / size
                row += batch.num_rows


def _check_end_of_stream(raw: Any, file: Path) -> None:
    """Raises: DataError for a stream that was cut between two messages, which its reader takes for a whole one."""
    size = raw.seek(0, os.SEEK_END)
    raw.seek(max(0, size - len(_END_OF_STREAM)))
    if raw.read() != _END_OF_STREAM:
        raise DataError(f"{file} is damaged or truncated: the Arrow stream has no end. Copy or fetch it again.")


def _columns_of(file: Path, names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The columns that hold the keys: of that very name, or of its part before the first dot.

    Raises: DataError if one is missing.
    """
    columns = {key: key if key in names else key.split(".")[0] for key in keys}
    missing = [key for key, column in columns.items() if column not in names]
    if missing:
        raise DataError(
            f"{file} has no column {', '.join(missing)}; its columns are {', '.join(names)}, name one with --json-keys."
        )
    return list(dict.fromkeys(columns.values()))


def _plain_rows(arrow: Any, batch: Any) -> list[dict[str, Any]]:
    """The rows as values of Python, texts as bytes.

    Raises: ArrowInvalid if the offsets of a column point outside of it.
    """
    columns = [_as_bytes(arrow, column) for column in batch.columns]
    for column in columns:
        column.validate(full=True)
    names = batch.schema.names
    return [dict(zip(names, row)) for row in zip(*(column.to_pylist() for column in columns))]


def _as_bytes(arrow: Any, column: Any) -> Any:
    """A column of texts, seen as one of bytes, which are not looked at; another column as it is."""
    if arrow.types.is_string(column.type):
        return column.view(arrow.binary())
    if arrow.types.is_large_string(column.type):
        return column.view(arrow.large_binary())
    return column
