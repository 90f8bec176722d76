"""The metrics file: what happened in a run, one JSON object a line, each step once even after a crash and a resume.

Records, in the order they stand in the file:

- `{"event": "start", ...}` first: the fields of `StartRecord`;
- `{"event": "resume", "from_step": N, ...}` after each resume from step N, with the fields of `StartRecord` again, as
  the layout may have changed;
- per training step the fields of `StepRecord`;
- per evaluation `{"step": N, "valid_loss": X}`, for a model of several losses also each of them and the accuracies.

Numbers are written so that reading them gives the same double. JSON has no NaN or infinity: such a value is written as
null, and its record gets `"finite": false`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, TextIO

from megatron3d.errors import DataError, StorageError


@dataclass(frozen=True)
class StartRecord:
    """What a reader must know to make sense of the steps.

    `layout` maps the name of each parallel axis to its degree (and "zero" to the ZeRO stage); `bytes_per_rank` has the
    keys weights, gradients and optimizer, and host and files where state is offloaded, for the rank that holds most;
    `predicted_bytes_per_rank` is what the ledger says before a step was made: these, at the highest moment of a step
    activations and buffers, and the peak of all that is on the device; it is empty where fine-tuning trains a model
    that the ledger does not know. `predicted_bubble` is the idle share of the pipeline, 0 to 1.
    """

    model: str
    parameters: int
    layout: Mapping[str, int]
    bytes_per_rank: Mapping[str, int]
    predicted_bytes_per_rank: Mapping[str, int]
    schedule: str
    predicted_bubble: float


@dataclass(frozen=True)
class StepRecord:
    """One training step: `loss` is the mean over the tokens of the global batch, `lr` the rate this step used.

    `step` counts from 1, the number of steps made including this one. `skipped` says that the weights stayed as they
    were; `loss` and `grad_norm` are None where there was no forward either (`--iterations-to-skip`). `loss_scale` and
    `batch_size` are written only where given. `losses` has the terms of a model of several losses by name, such as
    `lm_loss`, whose sum is `loss`; each is written under its own name.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float
    consumed_samples: int
    tokens_per_second: float
    skipped: bool = False
    loss_scale: float | None = None
    batch_size: int | None = None
    losses: Mapping[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, Any]:
        """What is written of the step, by name."""
        optional = ("loss_scale", "batch_size")
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "losses"}
        return {k: v for k, v in named.items() if v is not None or k not in optional} | dict(self.losses)


class MetricsFile:
    """The metrics file while a run writes it; on one rank only. Call `start` or `resume` first."""

    def __init__(self, path: str | Path) -> None:
        """Names the file; nothing is touched yet."""
        self.path = Path(path)
        self._file: TextIO | None = None

    def start(self, record: StartRecord) -> None:
        """Begin a run at step 0. A file already there is kept as `NAME.previous`, replacing an older one.

        Raises: StorageError if the file system refuses.
        """
        self.close()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size > 0:
                os.replace(self.path, self.path.with_name(self.path.name + ".previous"))
        except OSError as error:
            raise _storage_error(self.path, error) from error
        self._append({"event": "start", **asdict(record)})

    def resume(self, step: int, record: StartRecord, *, evaluation_due: bool = False) -> None:
        """Go on after `step`: forget what was written beyond it, and note the layout of the run that goes on.

        `evaluation_due` tells that the evaluation after `step` will be made now; if it stands there already, it goes.

        A file that is missing or empty (the path is new) starts with a start record that says so by `from_step`.

        Raises: DataError if the file is not a metrics file; StorageError if the file system refuses.
        """
        self.cut_back(step, with_evaluation=not evaluation_due)
        empty = not self.path.exists() or self.path.stat().st_size == 0
        self._append({"event": "start" if empty else "resume", "from_step": step, **asdict(record)})

    def cut_back(self, step: int, *, with_evaluation: bool = True) -> None:
        """Keep only what was known at `step`, with or without the evaluation that followed it: records of later steps,
        and of resumes at or after it, go.

        The file is written anew beside the old one and renamed, so that a crash leaves one of the two, whole. A torn
        last line (the writer died in it) goes too.

        Raises: DataError if another line is damaged; StorageError if the file system refuses.
        """
        self.close()
        if not self.path.exists():
            return
        kept = [r for r in read_records(self.path) if r.get("step", 0) <= step and r.get("from_step", -1) < step]
        if not with_evaluation:
            kept = [r for r in kept if r.get("step") != step or "valid_loss" not in r]
        try:
            _rewrite(self.path, kept)
        except OSError as error:
            raise _storage_error(self.path, error) from error

    def step(self, record: StepRecord) -> None:
        """Append one training step and hand it to the operating system at once.

        Raises: StorageError if the file system refuses.
        """
        self._append(record.scalars())

    def evaluation(self, step: int, valid_loss: float, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """Append the validation loss after `step`, and `more` of what the evaluation found by name.

        Raises: StorageError if the file system refuses.
        """
        self._append({"step": step, "valid_loss": valid_loss, **more})

    def close(self) -> None:
        """Close the file; another record opens it again.

        Raises: StorageError if the file system refuses the last bytes.
        """
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                raise _storage_error(self.path, error) from error

    def __enter__(self) -> MetricsFile:
        """The file itself, closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        """Write one line; the flush makes it survive a kill of the process (not a loss of power)."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise _storage_error(self.path, error) from error


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a metrics file, in order, without a torn last line.

    Raises: DataError if another line is not a JSON object, naming it.
    """
    lines = Path(path).read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"Line {number} of {path} is not JSON ({error}); repair or remove the file.") from error
        if not isinstance(record, dict):
            raise DataError(f"Line {number} of {path} is not a JSON object; is it a metrics file?")
        records.append(record)
    return records


def _rewrite(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file in one step; the bytes reach the disk before the name does."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(_line(r) for r in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _line(record: Mapping[str, Any]) -> str:
    """One JSON line; `json` writes the shortest digits that give the same double back."""
    clean = _without_non_finite(record)
    if clean != record:
        clean["finite"] = False
    return json.dumps(clean, allow_nan=False, ensure_ascii=False) + "\n"


def _without_non_finite(value: Any) -> Any:
    """The same value with None in place of NaN and infinities."""
    if isinstance(value, Mapping):
        return {k: _without_non_finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _storage_error(path: Path, error: OSError) -> StorageError:
    """The sentence for a write that failed."""
    return StorageError(
        f"--metrics-file {path} cannot be written: {error.strerror or error}; free space there or name another file."
    )
