"""Bad records of a corpus: how many a run may have, which there were, and the file that lists them.

A crawl has some, and one of them is no reason to lose a day's work; a key that is spelled wrong makes all of them bad,
and is. A run ends when the records that it has read show it: at its end with a share over the limit, before that when
it has read `EARLY_RECORDS` and more than half are bad (or more than the limit, where that is higher), or at the first
bad one where none is allowed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from megatron3d.data.partial_files import close_streams, cut_stream, open_exclusively
from megatron3d.data.prepare.records import Reject
from megatron3d.errors import ConfigError, DataError
from megatron3d.storage.durable import flush_to_disk
from megatron3d.storage.refusals import storage_errors

MAX_LINE_BYTES = 100_000_000
EARLY_RECORDS = 1000
EARLY_FRACTION = 0.5


@dataclass(frozen=True)
class BadRecordLimits:
    """How many bad records are allowed: none with `strict`, else a fraction of all, 0 to 1; and from which length on,
    its end not counted, a line is one, whatever it holds."""

    strict: bool = False
    max_fraction: float = 0.01
    max_line_bytes: int = MAX_LINE_BYTES


def add_bad_record_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of a tool that reads text; `limits_from_arguments` reads them."""
    group.add_argument("--strict", action="store_true", help="end at the first bad record")
    group.add_argument(
        "--max-bad-fraction", type=float, default=0.01, metavar="F", help="end if more records are bad (default 0.01)"
    )
    group.add_argument(
        "--max-line-bytes",
        type=int,
        default=MAX_LINE_BYTES,
        metavar="N",
        help=f"a longer line is a bad record (default {MAX_LINE_BYTES:,})",
    )


def limits_from_arguments(args: argparse.Namespace) -> BadRecordLimits:
    """The limits that `add_bad_record_arguments` declared. Raises: ConfigError for values that are none."""
    problems = []
    if not 0 <= args.max_bad_fraction <= 1:
        problems.append(f"--max-bad-fraction {args.max_bad_fraction:g} is not a fraction from 0 to 1.")
    if args.max_line_bytes < 1:
        problems.append(f"--max-line-bytes {args.max_line_bytes} is not at least 1.")
    if problems:
        raise ConfigError("\n".join(problems))
    return BadRecordLimits(args.strict, args.max_bad_fraction, args.max_line_bytes)


@dataclass
class RejectTally:
    """Counts records and rejects in the order of the input, and says when there are too many."""

    limits: BadRecordLimits
    num_records: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    first_message: str = ""

    @property
    def num_rejected(self) -> int:
        """Bad records so far."""
        return self.by_reason.total()

    @property
    def summary(self) -> str:
        """Such as `3 of 1,000 records rejected (2 key missing, 1 not JSON)`."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.by_reason.most_common())
        return f"{self.num_rejected:,} of {self.num_records:,} records rejected ({reasons})"

    def add(self, num_records: int, rejects: Sequence[Reject]) -> None:
        """Count the records of a batch, of which `rejects` are bad.

        Raises: DataError naming the first bad record if it may not be, or if so many are bad that the input must be
        another than was meant.
        """
        if rejects and not self.num_rejected:
            self.first_message = rejects[0].message
        self.num_records += num_records
        self.by_reason.update(str(reject.reason) for reject in rejects)
        if self.limits.strict and rejects:
            raise DataError(f"{rejects[0].message} Without --strict such a record is left out and counted.")
        is_early = self.limits.max_fraction > 0
        if not is_early or self.num_records >= EARLY_RECORDS:
            self._check(max(self.limits.max_fraction, EARLY_FRACTION * is_early))

    def finish(self) -> None:
        """Judge all records. Raises: DataError if more are bad than the limit allows."""
        self._check(self.limits.max_fraction)

    def _check(self, max_fraction: float) -> None:
        if self.num_rejected > max_fraction * self.num_records:
            raise DataError(
                f"{self.summary}, more than --max-bad-fraction {self.limits.max_fraction:g} allows; nothing was "
                f"written. The first: {self.first_message}"
            )


class RejectsFile:
    """The file that lists bad records, a JSON object a line; it exists if there are any.

    Written under a partial name that a later run finds, cut to what is known to be whole, and renamed at the end. A
    list that an earlier run left under the name is then removed, too, where there is nothing to list.
    """

    def __init__(self, path: Path) -> None:
        """Open `{path}.partial` as it is.

        Raises: StorageError if the place cannot be written; InUseError if another run is writing it.
        """
        self.path, self.size_bytes = path, 0
        with self._storing():
            self._stream = open_exclusively(path)

    @staticmethod
    def reclaim(path: Path, size_bytes: int) -> None:
        """Give a list that an earlier run published its partial name back. Raises: StorageError."""
        partial = path.with_name(f"{path.name}.partial")
        if size_bytes and not partial.exists() and path.exists() and path.stat().st_size == size_bytes:
            with storage_errors("write", path, way_out="give another --output-prefix"):
                path.replace(partial)

    def cut(self, size_bytes: int) -> None:
        """Drop what lies behind that byte. Raises: DataError if there is less; StorageError if the disk refuses."""
        cut_stream(self._stream, size_bytes)
        self.size_bytes = size_bytes

    def add(self, rejects: Sequence[Reject]) -> None:
        """List bad records. Raises: StorageError if the disk refuses."""
        with self._storing():
            for reject in rejects:
                self.size_bytes += self._stream.write(reject.as_json_line())

    def flush(self) -> None:
        """Wait until all is on the disk. Raises: StorageError."""
        with self._storing():
            flush_to_disk(self._stream)

    def publish(self) -> None:
        """Give the file its name, if it lists anything. Raises: StorageError."""
        self.flush()
        with self._storing():
            if self.size_bytes:
                Path(self._stream.name).replace(self.path)
            else:
                self.path.unlink(missing_ok=True)
        self.close(remove=not self.size_bytes)

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and remove it under its partial name. Raises: StorageError if the disk refuses the rest."""
        close_streams([self._stream], self.path, remove=remove)

    def _storing(self) -> AbstractContextManager[None]:
        return storage_errors("write", self.path, way_out="give another --output-prefix")
