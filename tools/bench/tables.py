"""Markdown tables of benchmarks, and the places of a page that they replace."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """One table: the key of its place in the page, a line above it, and cells."""

    key: str
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.caption, "", _line(self.columns), _line(("---",) * len(self.columns))]
        lines += [_line(row) for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


def write_tables(page: Path, tables: list[Table]) -> None:
    """Replace what stands between `<!-- compare: KEY -->` and `<!-- /compare -->` for every table.

    Raises:
        ValueError: the page has no such place for a table; nothing is written then.
    """
    text = page.read_text(encoding="utf-8")
    for table in tables:
        begin, end = f"<!-- compare: {table.key} -->", "<!-- /compare -->"
        place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        block = f"{begin}\n{table}\n{end}"
        text, count = place.subn(lambda _, block=block: block, text)
        if count != 1:
            raise ValueError(f"{page} has {count} places for the table '{table.key}', it needs one: {begin} ... {end}")
    page.write_text(text, encoding="utf-8")


def processor_name() -> str:
    """As the machine calls its processor."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", path.read_text()) if path.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
