"""Curves for TensorBoard and Weights & Biases: named scalars at a step, nothing else.

The names are free; those of a training are listed in docs/reports.md. One rank writes. Both packages run code of their
own, in threads and over networks, and raise what they like: whatever it is becomes a `TrackerError`, which a run
outlives, `SystemExit` among them, which some packages raise for an option of their own that they do not like.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron3d.errors import ConfigError, TrackerError, install_extra
from megatron3d.train.metrics import may_pass

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_S = 10.0  # what a crash can take from the curves
REOPEN_S = 30.0  # between attempts to open a place that failed: each costs a thread or a connection


class ScalarWriter(Protocol):
    """Something that draws curves."""

    def open(self) -> None:
        """Make it ready. Raises: TrackerError."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each named curve. Raises: TrackerError."""

    def close(self) -> None:
        """Hand over what is buffered and end. Raises: TrackerError."""


class TensorBoardWriter:
    """Event files for TensorBoard in a directory; after a failure it begins another file there."""

    def __init__(
        self, directory: str | Path, *, resumed_step: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Points after `resumed_step` that an earlier, killed run left in the directory are hidden by TensorBoard."""
        self._directory, self._clock = Path(directory), clock
        self._purge_step = resumed_step + 1 if resumed_step else None
        self._writer: SummaryWriter | None = None
        self._reopen_at, self._flush_at = 0.0, 0.0
        self._flushed_step = resumed_step

    def open(self) -> None:
        """Begin an event file. Raises: TrackerError if the directory cannot be made or written."""
        from torch.utils.tensorboard import SummaryWriter

        self._reopen_at = self._clock() + REOPEN_S
        try:
            self._writer = SummaryWriter(str(self._directory), purge_step=self._purge_step)
        except (Exception, SystemExit) as error:
            raise self._failure(error) from error

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each named curve. Raises: TrackerError if TensorBoard or the file system refuses."""
        if self._writer is None:
            if self._clock() < self._reopen_at:
                raise TrackerError(f"--tensorboard-dir {self._directory} is not open; it is tried again later.")
            self.open()
        assert self._writer is not None, "open() returned without a writer"
        try:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, global_step=step)
            if self._clock() >= self._flush_at:
                self._writer.flush()
                self._flush_at, self._flushed_step = self._clock() + FLUSH_S, step
        except (Exception, SystemExit) as error:
            self._abandon()
            raise self._failure(error) from error

    def close(self) -> None:
        """Write what is buffered. Raises: TrackerError if TensorBoard or the file system refuses."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
        except (Exception, SystemExit) as error:
            raise self._failure(error) from error

    def _abandon(self) -> None:
        """Leave a writer whose thread has died; points that it was handed before are still in its file."""
        self._writer, self._reopen_at = None, self._clock() + REOPEN_S
        self._purge_step = None  # a purge would hide the points that were written before the failure

    def _failure(self, error: BaseException) -> TrackerError:
        """The sentence for what TensorBoard raised."""
        return TrackerError(
            f"--tensorboard-dir {self._directory} cannot be written: {_reason(error)}; points after step "
            f"{self._flushed_step} may be lost. Free space there or name another directory.",
            may_pass=isinstance(error, OSError) and may_pass(error),
        )


class WandbWriter:
    """A Weights & Biases run. WANDB_MODE=offline, which wandb itself reads, keeps it on this machine."""

    def __init__(
        self,
        project: str,
        *,
        entity: str = "",
        name: str = "",
        directory: str = "",
        run: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`run` is the configuration shown beside the curves; `entity` the user or team that the project is of."""
        self._project, self._directory, self._clock = project, directory, clock
        self._options = {
            "project": project,
            "entity": entity or None,
            "name": name or None,
            "dir": directory or None,
            "config": dict(run),
        }
        self._run: Any = None
        self._reopen_at = 0.0

    def open(self) -> None:
        """Begin a run.

        Raises: ConfigError if the wandb package is not installed; TrackerError if its directory cannot be written or
            the service refuses.
        """
        try:
            # Imported here because only this option needs it and most installations lack it.
            wandb = importlib.import_module("wandb")
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"--wandb-project {self._project} needs the wandb package, which cannot be imported "
                f"({_reason(error)}); leave the option out, or run: {install_extra('wandb')}"
            ) from error
        self._reopen_at = self._clock() + REOPEN_S
        try:
            if self._directory:
                Path(self._directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackerError(
                f"--wandb-save-dir {self._directory} cannot be written: {error.strerror or error}; name another "
                "directory.",
                may_pass=may_pass(error),
            ) from error
        try:
            self._run = wandb.init(**self._options)
        except (Exception, SystemExit) as error:
            raise self._failure("cannot be started", error) from error

    def _opened(self) -> Any:
        if self._run is None:
            if self._clock() < self._reopen_at:
                raise TrackerError(f"--wandb-project {self._project} is not open; it is tried again later.")
            self.open()
        return self._run

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each named curve. Raises: TrackerError if wandb raises anything."""
        run = self._opened()
        try:
            run.log(dict(scalars), step=step)
        except (Exception, SystemExit) as error:
            raise self._failure("refused a point", error) from error

    def close(self) -> None:
        """Wait until everything is written or sent. Raises: TrackerError if wandb raises anything."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except (Exception, SystemExit) as error:
            raise self._failure("did not finish", error) from error

    def _failure(self, what: str, error: BaseException) -> TrackerError:
        """The sentence for what wandb raised."""
        return TrackerError(
            f"--wandb-project {self._project} {what}: {_reason(error)}. `wandb login` signs in, and WANDB_MODE=offline "
            "keeps the run on this machine.",
            is_remote=True,
        )


def _reason(error: BaseException) -> str:
    """What an exception of somebody else's package says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".splitlines()[0]
