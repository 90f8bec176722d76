"""One machine's part of a corpus: `--shard i/n`.

The input files lie in a row, which n - 1 cuts divide at equal distances in bytes on the disk; part i is what lies
between cut i and cut i + 1. A cut moves to where a record begins: in plain lines to the next beginning of a line, in
parquet to a row, in a compressed file, a text document or Arrow to the nearer end of the file. It depends on nothing
but the files and i/n, so the parts in their order are the corpus: the merged outputs are, byte for byte, those of one
run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron3d.data.prepare.columns import count_rows
from megatron3d.data.prepare.inputs import file_kind, is_compressed
from megatron3d.data.prepare.spans import InputSpan, whole_files
from megatron3d.errors import ConfigError

_STEP_BYTES = 1 << 20
_Cut = tuple[int, int]  # the number of a file, and a byte (or row) of it


@dataclass(frozen=True)
class Shard:
    """Part `index`, counted from 0, of `count`."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        """As the option takes it."""
        return f"{self.index}/{self.count}"

    @property
    def suffix(self) -> str:
        """What the names of its files end with; nothing where there is one part only."""
        return f"-{self.index:05d}-of-{self.count:05d}" if self.count > 1 else ""


def parse_shard(text: str) -> Shard:
    """The shard that `i/n` names. Raises: ConfigError."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None:
        raise ConfigError(f"--shard {text} is not of the form i/n, such as 0/16 for the first of sixteen.")
    index, count = int(match[1]), int(match[2])
    if not index < count:
        raise ConfigError(
            f"--shard {text}: shards count from 0, so of {count} the last is {max(count - 1, 0)}/{count}."
            if count
            else f"--shard {text}: there is at least 1 shard."
        )
    return Shard(index, count)


def shard_spans(files: Sequence[Path], shard: Shard) -> list[InputSpan]:
    """What `shard` reads, in order; nothing if all cuts around it moved to the same place.

    Raises: OSError if a file cannot be read; ConfigError or DataError as `count_rows` does.
    """
    if shard.count == 1:
        return whole_files(files)
    sizes = [file.stat().st_size for file in files]
    (first_file, first), (last_file, end) = (_cut(files, sizes, k, shard.count) for k in (shard.index, shard.index + 1))
    spans = []
    for number in range(first_file, min(last_file + 1, len(files))):
        begin, stop = first if number == first_file else 0, end if number == last_file else None
        if stop is None or begin < stop:
            spans.append(InputSpan(files[number], begin, stop))
    return spans


def _cut(files: Sequence[Path], sizes: Sequence[int], number: int, count: int) -> _Cut:
    """Where shard `number` of `count` begins, which is where the one before it ends."""
    if number == 0:
        return 0, 0
    byte = sum(sizes) * number // count
    for place, (file, size) in enumerate(zip(files, sizes)):
        if byte < size:
            return _cut_of_file(place, file, byte, size)
        byte -= size
    return len(files), 0


def _cut_of_file(place: int, file: Path, byte: int, size: int) -> _Cut:
    """The cut that byte `byte` of the file moves to."""
    after = (place + 1, 0)
    if byte == 0:
        return place, 0
    if file_kind(file) == ".parquet":
        num_rows = count_rows(file)
        row = num_rows * byte // size
        return (place, row) if row < num_rows else after
    if file_kind(file) in (".jsonl", ".json") and not is_compressed(file):
        begin = _line_from(file, byte)
        return (place, begin) if begin < size else after
    return (place, 0) if 2 * byte < size else after


def _line_from(file: Path, byte: int) -> int:
    """The first byte from `byte` on that begins a line; the end of the file if none does."""
    with open(file, "rb") as stream:
        stream.seek(byte - 1)
        while (part := stream.readline(_STEP_BYTES)) and not part.endswith(b"\n"):
            pass
        return stream.tell()
