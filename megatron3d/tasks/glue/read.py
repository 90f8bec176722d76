"""Reading TSV files: rows of texts and labels, or a sentence that names file, row and column.

The format is GLUE's: UTF-8 with or without a byte order mark, one sample a line, columns apart by one tab, no quoting
at all (a quote is a character like any other) and no escapes. Only a line feed ends a line, alone or behind a carriage
return: Unicode knows other line ends, and texts contain them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from megatron3d.errors import DataError
from megatron3d.files.text import TextError, read_lines
from megatron3d.tasks.glue.tasks import Task

_SHOWN = 3  # bad rows listed in one message
_MANY_LABELS = 20  # more than this many, and hardly a row like another: values, or a column of texts


@dataclass(frozen=True)
class SampleTable:
    """The samples of one file.

    Attributes:
        path: where they are from.
        texts: for each text column the texts of all samples.
        labels: classes (int) or values (float) of all samples; None for a file without labels.
        skipped: what was wrong with rows that were left out on request.
    """

    path: Path
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...] | tuple[float, ...] | None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Samples."""
        return len(self.texts[0])

    def digest(self) -> str:
        """A digest of texts and labels, by which a later run knows that its rows are the same."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()[:16]


def read_rows(path: Path, task: Task, *, labelled: bool, skip_bad_rows: bool = False) -> SampleTable:
    """Read one file of a task.

    A row without a label is nothing to learn from, and a row with an empty text is mostly damage: both are refused in
    labelled files. In a file to be predicted an empty text stays, as the leaderboard wants an answer to every row.

    Args:
        path: the file.
        task: names the columns and the labels.
        labelled: whether the label column is to be read.
        skip_bad_rows: leave rows with a problem out, and note them in `skipped`; only in labelled files.

    Raises:
        DataError: the file cannot be read, lacks a column, or has rows with missing columns, unknown labels, labels
            that are no number in a regression, or empty texts; or no rows.
    """
    header, lines, first_line = _table(path, task.headless_columns if labelled else ())
    columns = _Columns(path, header, task, labelled)
    kept: list[tuple[tuple[str, ...], float | int | None]] = []
    problems: list[str] = []
    for number, line in enumerate(lines, first_line):
        try:
            kept.append(columns.sample(line.split("\t")))
        except _BadRowError as problem:
            problems.append(f"{path} line {number}: {problem}")
    if problems and not (skip_bad_rows and labelled):
        raise DataError(_listed(problems, labelled))
    if not kept:
        raise DataError(f"{path} has no rows below its header; give a file with samples")
    texts = tuple(zip(*(texts for texts, _ in kept)))
    labels = cast("tuple[int, ...] | tuple[float, ...]", tuple(label for _, label in kept)) if labelled else None
    return SampleTable(path, texts, labels, tuple(problems))


def distinct_labels(path: Path, column: str) -> tuple[str, ...]:
    """The labels of a user's own training file, sorted; whole numbers by value.

    Raises:
        DataError: the file cannot be read, has no such column, or only one label.
    """
    header, lines, first_line = _table(path, ())
    at = _position(path, header, column)
    cells = [line.split("\t") for line in lines]
    all_labels = [row[at].strip() for row in cells if len(row) == len(header) and row[at].strip()]
    found = set(all_labels)
    if len(found) > max(_MANY_LABELS, len(all_labels) / 2):
        raise DataError(
            f"{path}: column {column!r} has {len(found)} different labels in {len(all_labels)} rows, which are no "
            "classes; learn them as values with --regression, or give another --label-column"
        )
    if len(found) < 2:
        wrong = (number for number, row in enumerate(cells, first_line) if len(row) != len(header))
        if (number := next(wrong, None)) is not None:
            raise DataError(f"{path} line {number}: {_other_width(cells[number - first_line], header)}")
        raise DataError(
            f"{path}: column {column!r} has {len(found)} different labels, and a classifier needs two; "
            "give another --label-column, or --regression"
        )
    are_numbers = all(label.lstrip("-").isdecimal() for label in found)
    return tuple(sorted(found, key=int if are_numbers else None))


def _other_width(cells: Sequence[str], header: Sequence[str]) -> str:
    return (
        f"it has {len(cells)} columns and the header {len(header)} ({', '.join(header)}); "
        "a tab inside a text, or one that is missing, must be repaired"
    )


class _BadRowError(Exception):
    """What is wrong with one row."""


class _Columns:
    """Where the texts and the label stand in a row, and what they may be."""

    def __init__(self, path: Path, header: Sequence[str], task: Task, labelled: bool) -> None:
        self.header, self.task = header, task
        self.texts = [_position(path, header, column) for column in task.texts]
        self.label = _position(path, header, task.label) if labelled else None
        self.classes = {name: number for number, name in enumerate(task.labels)}

    def sample(self, cells: Sequence[str]) -> tuple[tuple[str, ...], float | int | None]:
        """Texts and label of a row. Raises: _BadRowError."""
        if len(cells) != len(self.header):
            raise _BadRowError(_other_width(cells, self.header))
        texts = tuple(cells[at].strip() for at in self.texts)
        if self.label is None:
            return texts, None
        for column, text in zip(self.task.texts, texts):
            if not text:
                raise _BadRowError(f"the text in column {column!r} is empty; fill it in, or remove the row")
        word = cells[self.label].strip()
        return texts, self._value(word) if self.task.is_regression else self._class(word)

    def _class(self, word: str) -> int:
        if word not in self.classes:
            raise _BadRowError(
                f"the label {word!r} in column {self.task.label!r} is not one of {', '.join(self.task.labels)}; "
                "correct it, or remove the row"
            )
        return self.classes[word]

    def _value(self, word: str) -> float:
        low, high = self.task.value_range or (-math.inf, math.inf)
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            allowed = f"a number from {low:g} to {high:g}" if self.task.value_range else "a finite number"
            raise _BadRowError(
                f"{word!r} in column {self.task.label!r} is not {allowed}; correct it, or remove the row"
            )
        return value


def _table(path: Path, headless_columns: tuple[str, ...]) -> tuple[Sequence[str], list[str], int]:
    """Header, lines with samples, and the number of the first of these in the file, from 1."""
    try:
        lines = read_lines(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give the folder of the official TSV files"
        ) from error
    except TextError as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    if headless_columns:
        return headless_columns, lines, 1
    if not lines:
        raise DataError(f"{path} is empty; give a file with a header line and samples")
    return lines[0].split("\t"), lines[1:], 2


def _position(path: Path, header: Sequence[str], column: str) -> int:
    if column not in header:
        raise DataError(
            f"{path} has no column {column!r}; its header has {', '.join(repr(name) for name in header)}; "
            "give the official file, or name the columns with --text-column and --label-column"
        )
    return list(header).index(column)


def _listed(problems: list[str], labelled: bool) -> str:
    more = f"; and {len(problems) - _SHOWN} more rows" if len(problems) > _SHOWN else ""
    way_out = "; or leave such rows out with --skip-bad-rows" if labelled else ""
    return f"{'; '.join(problems[:_SHOWN])}{more}{way_out}"
