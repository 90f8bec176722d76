"""What a fine-tuning reports while it runs: the log lines and the metrics file of pretraining, with true token counts.

Batches have different lengths, so rates count the tokens that were there and not the padding.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from megatron3d.comm.device import peak_memory_bytes
from megatron3d.config.serialize import to_dict
from megatron3d.models.flops import classifier_flops
from megatron3d.tasks.glue.order import PlannedStep, padded_share
from megatron3d.train.dropout import dropout_note
from megatron3d.train.progress import ProgressReporter, StepReport
from megatron3d.train.reports import devices_of, start_record, step_record
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.state import Progress, last_step
from megatron3d.train.step import Rates, StepResult
from megatron3d.train.trackers import Trackers


class TaskReports:
    """A context manager; every rank makes one, and those of ranks above 0 write nothing."""

    def __init__(self, parts: TrainingSetup, num_outputs: int) -> None:
        """Of a classifier with that many outputs."""
        self.parts = parts
        self._flops = classifier_flops(parts.config.model, num_outputs, parts.config.train.freeze_params)
        self._exits = ExitStack()
        self._trackers = Trackers(parts.config.train)
        self._progress: ProgressReporter | None = None
        self._devices = devices_of(parts)
        self._lengths_N: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def __enter__(self) -> TaskReports:
        """Open the metrics file and the progress line."""
        record = start_record(self.parts)
        if self.parts.mesh.rank > 0:
            return self
        config = self.parts.config
        self._exits.callback(self._trackers.close)
        self._trackers.open(record, run=to_dict(config), resumed_step=0)
        reporter = ProgressReporter(
            last_step(config.train, config.parallel.data_parallel_size, Progress(), seq_length=config.model.seq_length),
            sys.stderr,
            log_interval=config.train.log_interval,
            devices=self._devices,
        )
        self._progress = self._exits.enter_context(reporter)
        dropout = dropout_note(config.model, self.parts.model.device.type)
        if dropout:
            self.note(dropout)
        return self

    def __exit__(self, *error: object) -> None:
        """Close both."""
        self._exits.close()

    def epoch(self, epoch: int, steps: Sequence[PlannedStep], lengths_N: NDArray[np.int64]) -> None:
        """An epoch of these steps begins."""
        self._lengths_N = lengths_N
        padding = padded_share(list(steps), lengths_N)
        self.note(f"epoch {epoch + 1}: {len(steps)} steps, {padding:.1%} of their positions are padding")

    def step(
        self, progress: Progress, result: StepResult, rates: Rates, planned: PlannedStep, *, elapsed_s: float
    ) -> None:
        """One step is done."""
        if self._progress is None:
            return
        tokens = planned.num_tokens(self._lengths_N)
        report = StepReport(
            step=progress.step,
            loss=result.loss,
            lr=rates.lr,
            grad_norm=result.grad_norm,
            tokens=tokens,
            flops=self._flops.of(planned.lengths(self._lengths_N)),
            elapsed_s=elapsed_s,
            skipped=result.skipped,
            memory_bytes=peak_memory_bytes(self.parts.model.device),
        )
        self._progress.step(report)
        record = step_record(
            report,
            self._devices,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_tokens,
            batch_size=planned.num_samples,
        )
        self._trackers.step(record)

    def measured(self, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        """The metrics on dev after a step."""
        if self._progress is not None:
            self._trackers.evaluation(step, loss, {f"valid_{name}": value for name, value in metrics.items()})

    def note(self, text: str) -> None:
        """Write a line, on rank 0."""
        if self._progress is not None:
            self._progress.note(text)
