"""The metrics file: what happened in a run, one JSON object a line, each step once even after a crash and a resume.

Records, in the order they stand in the file:

- `{"event": "start", ...}` first: the fields of `StartRecord`;
- `{"event": "resume", "from_step": N, ...}` after each resume from step N, with the fields of `StartRecord` again, as
  the layout may have changed;
- per training step the fields of `StepRecord`;
- per evaluation `{"step": N, "valid_loss": X}`, for a model of several losses also each of them and the accuracies;
- per save `{"step": N, "save_s": X, "save_bytes": B, "wall_s": Y}`.

Numbers are written so that reading them gives the same double. JSON has no NaN or infinity: such a value is written as
null, and its record gets `"finite": false`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from megatron3d.errors import DataError, TrackerError
from megatron3d.files import json_text
from megatron3d.storage.atomic import atomic_path


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
    were; `loss` and `grad_norm` are None where there was no forward either (`--iterations-to-skip`). What follows
    `skipped` is written only where it is given:

    - `loss_scale` with fp16; `batch_size` in samples;
    - `consumed_tokens` up to and with this step: consumed samples x sequence length, padding included, as
      `tokens_per_second` has them; for a fine-tuning the tokens that were there; under a sequence-length curriculum
      those that steps were made of;
    - `sample_length` under such a curriculum: how many tokens samples (or the rows they are split into) had;
    - `step_time_s` of the step alone, without evaluations and saves;
    - `tflops_per_device`, of the model's operations, and `mfu`, their share of the device's peak, 0 to 1, where that is
      known (or given by `--peak-tflops`);
    - `layer_tokens` where layers drop tokens: how many each layer saw in the step, added up over the layers; without
      dropping it would be tokens x layers;
    - `peak_memory_bytes` of rank 0 so far: of the allocator on CUDA, of the whole process on a CPU;
    - `goodput`, `wall_s` and `lost_steps` of the run so far (`goodput.py`).

    `losses` has those of a model of several losses by name, such as `lm_loss`, whose weighted sum is `loss`; each is
    written under its own name, as is each of `expert_loads` of a mixture of experts (`train/expert_load.py`).
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
    consumed_tokens: int | None = None
    sample_length: int | None = None
    step_time_s: float | None = None
    tflops_per_device: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    goodput: float | None = None
    wall_s: float | None = None
    lost_steps: int | None = None
    layer_tokens: int | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    expert_loads: Mapping[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, Any]:
        """What is written of the step, by name."""
        nested = ("losses", "expert_loads")
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in nested}
        always = ("loss", "grad_norm")  # null says that there was none, or none that is finite
        return {k: v for k, v in named.items() if v is not None or k in always} | {**self.losses, **self.expert_loads}


class MetricsFile:
    """The metrics file while a run writes it; on one rank only. Call `start` or `resume` first.

    Every line is written whole or not at all: what a full disk took of one is cut off again. Every method that writes
    may be called again after it failed, and does then what is still to be done.
    """

    def __init__(self, path: str | Path, *, warn: Callable[[str], None] = print) -> None:
        """Names the file; nothing is touched yet. `warn` takes a sentence about lines that were damaged."""
        self.path = Path(path)
        self._warn = warn
        self._fd: int | None = None
        self._torn_at: int | None = None
        self._opening: Callable[[], None] | None = None

    def begin(
        self,
        record: StartRecord,
        *,
        resumed_step: int,
        evaluation_due: bool = False,
        more: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """`resume` from this step, or `start` where it is 0. Raises: as they do."""
        if resumed_step:
            self.resume(resumed_step, record, evaluation_due=evaluation_due, more=more)
        else:
            self.start(record)

    def start(self, record: StartRecord) -> None:
        """Begin a run at step 0. A file already there is kept as `NAME.previous`, replacing an older one.

        Raises: TrackerError if the file system refuses.
        """
        self._opening = lambda: self._start(record)
        self._open()

    def resume(
        self,
        step: int,
        record: StartRecord,
        *,
        evaluation_due: bool = False,
        more: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Continue after `step`: forget what was written beyond it, and note the layout of the run from here on.

        `evaluation_due` means that the evaluation after `step` will be made now; if it stands there already, it goes.
        `more` is noted by name, such as the time that was spent so far.

        A file that is missing or empty (the path is new) starts with a start record that says so by `from_step`.

        Raises: DataError if the file is not a metrics file; TrackerError if the file system refuses.
        """
        self._opening = lambda: self._resume(step, record, evaluation_due, more)
        self._open()

    def cut_back(self, step: int, *, with_evaluation: bool = True) -> None:
        """Keep only what was known at `step`, with or without the evaluation that followed it: records of later steps,
        and of resumes at or after it, go.

        The file is written anew beside the old one and renamed, so that a crash leaves one of the two, whole. A torn
        last line (the writer died in it, or power was lost) goes too. Other damaged lines go as well, and the file
        with them is kept as `NAME.damaged`.

        Raises: DataError if no line is a record; TrackerError if the file system refuses.
        """
        self.close()
        if not self.path.is_file():  # missing, or a device or pipe, which nobody can read back
            return
        try:
            records, damage = salvage(self.path)
            if damage:
                damaged = self.path.with_name(self.path.name + ".damaged")
                shutil.copyfile(self.path, damaged)
                self._warn(f"{damage[0]}; it was left out, and the file as it was is kept as {damaged}")
            kept = [r for r in records if r.get("step", 0) <= step and r.get("from_step", -1) < step]
            if not with_evaluation:
                kept = [r for r in kept if r.get("step") != step or "valid_loss" not in r]
            _rewrite(self.path, kept)
        except OSError as error:
            raise _tracker_error(self.path, error) from error

    def step(self, record: StepRecord) -> None:
        """Append one training step and hand it to the operating system at once.

        Raises: TrackerError if the file system refuses.
        """
        self._open()
        self._append(record.scalars())

    def evaluation(self, step: int, valid_loss: float, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """Append the validation loss after `step`, and `more` of what the evaluation found by name.

        Raises: TrackerError if the file system refuses.
        """
        self._open()
        self._append({"step": step, "valid_loss": valid_loss, **more})

    def save(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append the time and size of the save after `step`.

        Raises: TrackerError if the file system refuses.
        """
        self._open()
        self._append({"step": step, **numbers})

    def close(self) -> None:
        """Close the file; another record opens it again.

        Raises: TrackerError if the file system refuses the last bytes.
        """
        if self._fd is not None:
            fd, self._fd = self._fd, None
            try:
                os.close(fd)
            except OSError as error:
                raise _tracker_error(self.path, error) from error

    def __enter__(self) -> MetricsFile:
        """The file itself, closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def _open(self) -> None:
        """Do what `start` or `resume` could not do yet."""
        if self._opening is not None:
            self._opening()
            self._opening = None

    def _start(self, record: StartRecord) -> None:
        self.close()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file() and self.path.stat().st_size > 0:
                os.replace(self.path, self.path.with_name(self.path.name + ".previous"))
        except OSError as error:
            raise _tracker_error(self.path, error) from error
        self._append({"event": "start", **asdict(record)})

    def _resume(self, step: int, record: StartRecord, evaluation_due: bool, more: Mapping[str, float]) -> None:
        self.cut_back(step, with_evaluation=not evaluation_due)
        empty = not self.path.exists() or self.path.stat().st_size == 0
        self._append({"event": "start" if empty else "resume", "from_step": step, **more, **asdict(record)})

    def _append(self, record: Mapping[str, Any]) -> None:
        """Write one line; the system has it then, so it survives a kill of the process (not a loss of power)."""
        line = _line(record).encode()
        try:
            fd = self._fd_of_path()
            if self._torn_at is not None:
                os.ftruncate(fd, self._torn_at)  # what a refused write left of its line
                self._torn_at = None
            written = 0
            while written < len(line):
                try:
                    written += os.write(fd, line[written:])
                except OSError:
                    self._torn_at = os.fstat(fd).st_size - written if written else None
                    raise
        except OSError as error:
            raise _tracker_error(self.path, error) from error

    def _fd_of_path(self) -> int:
        """The open file, anew where the path names another one by now: removed, or rotated."""
        if self._fd is not None and not _names(self.path, self._fd):
            self.close()
        if self._fd is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._torn_at = None
        return self._fd


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a metrics file, in order, without a torn last line.

    Raises: DataError if another line is not a JSON object, naming it.
    """
    records, damage = salvage(Path(path))
    if damage:
        raise DataError(f"{damage[0]}; repair or remove the file.")
    return records


def salvage(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a metrics file, and for each damaged line before the last a sentence that names it.

    A last line that is no JSON is torn, not damaged: its writer died in it. So are NUL bytes at the end, which a file
    system leaves where it lost power between the new length and the new bytes.

    Raises: DataError if there are lines and none is a record, as this is no metrics file; OSError if it cannot be read.
    """
    lines = path.read_bytes().rstrip(b"\x00 \t\r\n").split(b"\n")
    records, damage = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json_text.parse(line)
        except ValueError as error:
            if number < len(lines):
                damage.append(f"Line {number} of {path} is not JSON ({error})")
            continue
        if not isinstance(record, dict):
            raise DataError(f"Line {number} of {path} is not a JSON object; is it a metrics file?")
        records.append(record)
    if damage and not records:
        raise DataError(f"{damage[0]}, nor is any other line; is it a metrics file? Name another one.")
    return records, damage


def may_pass(error: OSError) -> bool:
    """Whether a refusal of the file system may pass by itself, and so is no mistake in the path."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


def _names(path: Path, fd: int) -> bool:
    """Whether the path leads to the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _rewrite(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file in one step; the bytes reach the disk before the name does."""
    with atomic_path(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(_line(r) for r in records)


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


def _tracker_error(path: Path, error: OSError) -> TrackerError:
    """The sentence for a write that failed."""
    return TrackerError(
        f"--metrics-file {path} cannot be written: {error.strerror or error}; free space there or name another file.",
        may_pass=may_pass(error),
    )
