"""Which part of which input file is read, and how far the reading has come: what a resumed run starts from.

A span is a whole file or a range of its records. Ranges of plain lines are given in bytes, because a byte can be found
without reading what lies before it; those of parquet in rows. Compressed streams and text documents are read whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InputSpan:
    """Records `first` up to `end` (None: the last) of a file: bytes of plain lines, rows of parquet; else the file."""

    file: Path
    first: int = 0
    end: int | None = None

    @property
    def name(self) -> str:
        """What messages call it: line numbers of a span that does not begin with the file count from its byte."""
        is_cut = self.first > 0 and self.file.suffix != ".parquet"
        return f"{self.file} from byte {self.first}" if is_cut else str(self.file)


@dataclass(frozen=True)
class Position:
    """A place between two records: `num_read` lines (or rows) of span number `span` lie before it.

    `byte` is where that is in the file, for plain lines; compressed streams are read again up to the line.
    """

    span: int = 0
    num_read: int = 0
    byte: int = 0


def whole_files(files: Iterable[Path]) -> list[InputSpan]:
    """A span for each file."""
    return [InputSpan(file) for file in files]
