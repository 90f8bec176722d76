"""Trackers: the metrics file and the curves of a run, kept from ever ending it.

A tracker that fails while the run goes on is reported once on standard error; the next record is tried again, so it
resumes when the disk has space or the service answers. At the end one line says what it missed. At the start the
causes are distinguished: a path that can never be written is the user's to mend and raises, a full disk does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from megatron3d.config.sections.train import TrainConfig
from megatron3d.errors import TrackerError
from megatron3d.train.megatron_names import evaluation_scalars, over_samples, step_scalars
from megatron3d.train.metrics import MetricsFile, StartRecord, StepRecord
from megatron3d.train.timestamp import local_time, stamped
from megatron3d.train.writers import ScalarWriter, TensorBoardWriter, WandbWriter

OVER_SAMPLES = "vs_samples"  # below --tensorboard-dir: the curves over samples, a TensorBoard run of their own

SinkT = TypeVar("SinkT")
Warn = Callable[[str], None]


def warn_on_stderr(text: str) -> None:
    """Write a line to standard error at once."""
    print(stamped(f"warning: {text}", local_time()), file=sys.stderr, flush=True)


class Tracker(Generic[SinkT]):
    """One place that is written to while training goes on, whatever happens to it."""

    def __init__(self, name: str, sink: SinkT, *, warn: Warn = warn_on_stderr) -> None:
        """`name` is the option and its value, `warn` takes sentences about failures."""
        self.name, self.sink = name, sink
        self._warn = warn
        self._missed = 0
        self._first_missed, self._last_missed = 0, 0

    def attempt(self, step: int, write: Callable[[SinkT], None]) -> None:
        """Let `write` use the place for a record of `step`; a `TrackerError` is counted, and the first is reported."""
        try:
            write(self.sink)
        except TrackerError as error:
            self._miss(step, error)

    def finish(self, close: Callable[[SinkT], None]) -> None:
        """Close the place, and report what it missed."""
        try:
            close(self.sink)
        except TrackerError as error:
            self._miss(self._last_missed, error)
        if self._missed:
            steps = f"between steps {self._first_missed} and {self._last_missed}"
            self._warn(f"{self.name} missed {self._missed} record{'s' * (self._missed > 1)} {steps}")

    def _miss(self, step: int, error: TrackerError) -> None:
        if not self._missed:
            self._first_missed = step
            self._warn(f"{error} Training continues, and later records are tried again.")
        self._missed += 1
        self._last_missed = max(self._last_missed, step)


class Trackers:
    """Every tracker that the options ask for, on the rank that writes.

    Curves have our names and Megatron-LM's. Its curves over samples lie in a directory of their own: after a resume
    TensorBoard hides what an earlier run wrote beyond a step, in all curves of a directory alike, and steps and samples
    are different numbers.
    """

    def __init__(self, train: TrainConfig, *, warn: Warn = warn_on_stderr) -> None:
        """Nothing is opened yet."""
        self._train, self._warn = train, warn
        self._metrics: Tracker[MetricsFile] | None = None
        self._writers: list[Tracker[ScalarWriter]] = []
        self._over_samples: Tracker[ScalarWriter] | None = None

    def open(
        self,
        record: StartRecord,
        *,
        run: Mapping[str, Any],
        resumed_step: int,
        resumed_samples: int = 0,
        evaluation_due: bool = False,
        more: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Begin, or continue after `resumed_step` where it is not 0.

        Args:
            record: what the metrics file begins with.
            run: the configuration, shown beside the curves.
            resumed_step: the step of the checkpoint that training starts from.
            resumed_samples: the samples consumed until then.
            evaluation_due: whether the evaluation after that step is made now.
            more: what the metrics file notes of a resume, by name.

        Raises: TrackerError if a place can never be written, such as a path below a file; ConfigError if a package is
            missing.
        """
        if self._train.metrics_file:
            file = MetricsFile(self._train.metrics_file, warn=self._warn)
            self._metrics = Tracker(f"--metrics-file {file.path}", file, warn=self._warn)
            at: dict[str, Any] = {"resumed_step": resumed_step, "evaluation_due": evaluation_due, "more": more}
            self._begin(self._metrics, resumed_step, lambda one: one.begin(record, **at))
        for name, writer in self._curve_writers(run, resumed_step):
            tracker = Tracker(name, writer, warn=self._warn)
            self._writers.append(tracker)
            self._begin(tracker, resumed_step, lambda one: one.open())
        if self._train.tensorboard_dir:
            directory = Path(self._train.tensorboard_dir) / OVER_SAMPLES
            over = TensorBoardWriter(directory, resumed_step=resumed_samples)
            self._over_samples = Tracker(f"--tensorboard-dir {directory}", over, warn=self._warn)
            self._begin(self._over_samples, resumed_step, lambda one: one.open())

    def step(self, record: StepRecord) -> None:
        """Record one training step."""
        if self._metrics is not None:
            self._metrics.attempt(record.step, lambda file: file.step(record))
        ours = {name: float(v) for name, v in record.scalars().items() if name != "step" and v is not None}
        theirs = step_scalars(record)
        self.draw(record.step, ours | theirs)
        self._draw_over_samples(record.step, record.consumed_samples, theirs)

    def evaluation(
        self,
        step: int,
        valid_loss: float,
        more: Mapping[str, float],
        *,
        losses: Mapping[str, float] = MappingProxyType({}),
        consumed_samples: int = 0,
    ) -> None:
        """Record the validation loss after `step`, and `more` of what the evaluation found by name.

        `losses` of the model by name, after so many samples, are drawn under Megatron-LM's names.
        """
        if self._metrics is not None:
            self._metrics.attempt(step, lambda file: file.evaluation(step, valid_loss, more))
        theirs = evaluation_scalars(losses)
        self.draw(step, {"valid_loss": valid_loss, **more, **theirs})
        self._draw_over_samples(step, consumed_samples, theirs)

    def save(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the time and size of the save after `step`."""
        if self._metrics is not None:
            self._metrics.attempt(step, lambda file: file.save(step, numbers))
        self.draw(step, numbers)

    def draw(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add a point to each named curve."""
        for tracker in self._writers:
            tracker.attempt(step, lambda writer: writer.write(step, scalars))

    def close(self) -> None:
        """Close everything, and report what was missed."""
        if self._metrics is not None:
            self._metrics.finish(MetricsFile.close)
        for tracker in (*self._writers, self._over_samples):
            if tracker is not None:
                tracker.finish(lambda writer: writer.close())

    def _draw_over_samples(self, step: int, consumed_samples: int, scalars: Mapping[str, float]) -> None:
        if self._over_samples is not None and scalars:
            self._over_samples.attempt(step, lambda writer: writer.write(consumed_samples, over_samples(scalars)))

    def _curve_writers(self, run: Mapping[str, Any], resumed_step: int) -> Iterator[tuple[str, ScalarWriter]]:
        train = self._train
        if train.tensorboard_dir:
            writer = TensorBoardWriter(train.tensorboard_dir, resumed_step=resumed_step)
            yield f"--tensorboard-dir {train.tensorboard_dir}", writer
        if train.wandb_project:
            names: dict[str, Any] = {
                "entity": train.wandb_entity,
                "name": train.wandb_exp_name,
                "directory": train.wandb_save_dir,
            }
            yield f"--wandb-project {train.wandb_project}", WandbWriter(train.wandb_project, run=run, **names)

    def _begin(self, tracker: Tracker[SinkT], resumed_step: int, begin: Callable[[SinkT], None]) -> None:
        """Open a place; only what may pass by itself, or what a resumed run once had, is left to later records.

        Raises: TrackerError for any other failure.
        """
        try:
            begin(tracker.sink)
        except TrackerError as error:
            if not error.may_pass and not (error.is_remote and resumed_step):
                raise
            failure = error
            tracker.attempt(resumed_step, lambda _: _raise(failure))


def _raise(error: TrackerError) -> None:
    raise error
