"""Fine-tuning: epochs over a task, measured after each, the best weights kept.

A step is that of pretraining (`train/step.py`); what differs is what goes around it. Samples come in epochs and in
batches of different lengths, and the weights that count are not the last but those with the best metrics on the dev
file.

Source: Devlin et al. 2018 (arXiv:1810.04805), section 4.1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron3d.comm.device import synchronize
from megatron3d.data.batch import GroupedSamples
from megatron3d.errors import NumericsError
from megatron3d.optim.schedule import ScheduleSettings, settings_from_config
from megatron3d.tasks.glue import weights
from megatron3d.tasks.glue.average import WeightAverage
from megatron3d.tasks.glue.encode import Encoded, hide_tokens
from megatron3d.tasks.glue.existing import ExistingClassifier, find_existing
from megatron3d.tasks.glue.metrics import mean_of
from megatron3d.tasks.glue.order import PlannedStep, training_steps
from megatron3d.tasks.glue.pace import Pace
from megatron3d.tasks.glue.predict import mean_loss, metrics_of, scores
from megatron3d.tasks.glue.reports import TaskReports
from megatron3d.tasks.glue.tasks import Task
from megatron3d.train.deferred_failure import DeferredFailure
from megatron3d.train.launch import RunContext
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.state import Progress
from megatron3d.train.step import Rates, StepResult, train_step
from megatron3d.train.stopping import stop_if_asked


@dataclass(frozen=True)
class TaskData:
    """The encoded files of a task: training (None if nothing is trained), dev by metric ending, test by name.

    `dev_digests` are those of the rows of the dev files: metrics on other rows cannot be compared.
    """

    train: Encoded | None
    dev: Mapping[str, Encoded]
    test: Mapping[str, Encoded]
    dev_digests: Mapping[str, str]


@dataclass(frozen=True)
class DevResult:
    """What a measurement on the dev files found: metrics by name (with the ending of their file), and mean loss."""

    metrics: Mapping[str, float]
    loss: float

    @property
    def score(self) -> float:
        """The mean of the metrics, by which the best weights are chosen."""
        return mean_of(self.metrics)

    @property
    def rank(self) -> tuple[float, float]:
        """What measurements are ordered by: the score, and of equal scores the lower loss."""
        return self.score, -self.loss


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tuning gave: the best measurement, the epoch it was made in or after (0 is before the first), the
    step, the samples and time of the training steps alone, and the checkpoint of the best weights if there is one."""

    best: DevResult
    epoch: int
    step: int
    samples: int
    train_s: float
    saved: Path | None


@dataclass(frozen=True)
class FinetuneSettings:
    """How to go about it.

    Attributes:
        task: what is learned.
        epochs: how often every sample is seen.
        max_length: tokens that samples were cut to, for `task.json` of the checkpoint.
        multiple: what the length of a batch is a multiple of.
        group_size: samples of near-equal length that stay together in a step.
        token_dropout: the probability with which a token of a training sample is hidden.
        ema_decay: of the average of the weights, which is then what is measured and kept; None for the weights
            themselves.
        eval_interval: steps between measurements on the dev files; None measures after each epoch alone.
        save: where the best checkpoint goes.
        renew_hold: called before each save, see `train/held.py`.
    """

    task: Task
    epochs: int
    max_length: int
    multiple: int
    group_size: int
    token_dropout: float
    ema_decay: float | None
    eval_interval: int | None
    save: Path | None
    renew_hold: Callable[[], str | None]


def finetune(
    parts: TrainingSetup, data: TaskData, settings: FinetuneSettings, *, context: RunContext, log: Callable[[str], None]
) -> Finetuned:
    """Train for the epochs that are asked for and leave the best weights in the model; collective over all ranks.

    Args:
        parts: the rank's model, with the weights to start from in place, and its optimizer.
        data: the encoded files.
        settings: how.
        context: learns the step, for reports of how the run ended, and knows whether the run was asked to stop.
        log: takes lines for people; silent on all ranks but one.

    Raises:
        NumericsError: a loss, a gradient or a weight is not finite; what was saved before stands.
        StopRequested: the run was asked to stop; the best weights that it had are saved, if it saves at all.
    """
    if data.train is None:
        give_up = partial(stop_if_asked, context, parts.mesh, when="while measuring", outcome="start again")
        found = measure_dev(parts, data.dev, settings, log, give_up)
        log(_line("as loaded", found))
        return Finetuned(found, 0, 0, 0, 0.0, None)
    context.step = 0
    kept = None
    if settings.save is not None:
        names = (f"{name}{ending}" for ending in data.dev for name in settings.task.metrics)
        kept = find_existing(settings.save, settings.task, names, data.dev_digests, group=parts.mesh.world.group)
    with ExitStack() as exits:
        reports = exits.enter_context(TaskReports(parts, settings.task.num_outputs))
        loop = _Loop(parts, data.train, data, settings, reports, context, kept=kept)
        try:
            for epoch in range(settings.epochs):
                loop.train_epoch(epoch)
        except Exception as error:
            error.add_note(f"on {parts.mesh}, after step {loop.progress.step}")
            raise
        loop.take_back_best()
    assert loop.best is not None, f"{settings.epochs} epochs end with a measurement each"
    return loop.best


class _Loop:
    """One fine-tuning under way."""

    def __init__(
        self,
        parts: TrainingSetup,
        train: Encoded,
        data: TaskData,
        settings: FinetuneSettings,
        reports: TaskReports,
        context: RunContext,
        *,
        kept: ExistingClassifier | None,
    ) -> None:
        self.parts, self.samples, self.data, self.settings = parts, train, data, settings
        self.reports, self.context, self.kept = reports, context, kept
        self.schedule: ScheduleSettings = settings_from_config(parts.config.optim, parts.config.train)
        self.progress = Progress()
        self.failure = DeferredFailure(parts.mesh)
        self.average = None if settings.ema_decay is None else WeightAverage(parts, settings.ema_decay)
        self.best: Finetuned | None = None
        self.saved: Path | None = None
        self.best_weights: Mapping[str, Tensor] = {}
        self.train_s = 0.0

    def train_epoch(self, epoch: int) -> None:
        """Train and measure: after the epoch, and within it as often as is asked for."""
        config, samples = self.parts.config, self.samples
        if self.settings.token_dropout > 0:
            samples = hide_tokens(samples, self.settings.token_dropout, seed=config.data.seed, epoch=epoch)
        steps = training_steps(
            samples.lengths_N,
            step_size=config.train.global_batch_size,
            group_size=self.settings.group_size,
            multiple=self.settings.multiple,
            seed=config.data.seed,
            epoch=epoch,
        )
        self.reports.epoch(epoch, steps, samples.lengths_N)
        for planned in steps:
            began_s = time.monotonic()
            rates = self._rates()
            result = self._step(samples, planned, rates)
            if self.average is not None:
                self.average.add()
            elapsed_s = time.monotonic() - began_s
            self.train_s += elapsed_s
            self._report_step(result, rates, planned, elapsed_s)
            if result.stop_votes:
                self._stop_if_asked()
            if planned is not steps[-1] and self._is_time_to_measure():
                self._measure(epoch, f"step {self.progress.step}")
        self._measure(epoch, f"epoch {epoch + 1}")

    def _report_step(self, result: StepResult, rates: Rates, planned: PlannedStep, elapsed_s: float) -> None:
        self.failure.keep(lambda: self.reports.step(self.progress, result, rates, planned, elapsed_s=elapsed_s))

    def _stop_if_asked(self) -> None:
        """Unlike a pretraining this keeps no optimizer state: what is saved are the best weights measured so far."""
        when = f"after step {self.progress.step}"
        stop_if_asked(
            self.context, self.parts.mesh, when=when, outcome=f"{self._kept()}; started again, it begins anew"
        )

    def _kept(self) -> str:
        if self.saved is not None:
            return f"the best weights so far are saved at {self.saved}"
        if self.settings.save is not None and self.best is not None and self.kept is not None:
            return f"no weights are saved, as {self.kept.directory} of an earlier run is better"
        return "no weights are saved"

    def _is_time_to_measure(self) -> bool:
        interval = self.settings.eval_interval
        return interval is not None and self.progress.step % interval == 0

    def _rates(self) -> Rates:
        at = self.progress.of_updates()
        return Rates(self.schedule.lr_at(**at), self.schedule.weight_decay_at(**at))

    def _step(self, samples: Encoded, planned: PlannedStep, rates: Rates) -> StepResult:
        readers, before = self.parts.mesh.batch, self.progress
        mine = grouped(samples, planned.part(readers.rank, readers.size))
        result = train_step(self.parts, mine, rates, step=before.step, wants_stop=bool(self.context.stop))
        synchronize(self.parts.model.device)
        tokens = planned.num_tokens(samples.lengths_N)
        self.progress = before.after(planned.num_samples, tokens=tokens, skipped=result.skipped)
        self.context.step = self.progress.step
        return result

    def _measure(self, epoch: int, when: str) -> None:
        """Measure on the dev files; keep and save the weights if they are the best so far."""
        with self.parts.engine.updated_weights(), nullcontext() if self.average is None else self.average.in_place():
            self._measure_and_keep(epoch, when)
        self.failure.raise_on_all_ranks(self._kept())

    def _measure_and_keep(self, epoch: int, when: str) -> None:
        found = measure_dev(self.parts, self.data.dev, self.settings, self.reports.note, self._stop_if_asked)
        self.failure.keep(lambda: self.reports.measured(self.progress.step, found.loss, found.metrics))
        self.reports.note(_line(f"after {when}", found))
        step, samples = self.progress.step, self.progress.consumed_samples
        if not math.isfinite(found.loss):
            raise NumericsError(
                f"the loss on the dev files after {when} is {found.loss}, so the weights are of no use and not kept; "
                f"lower --lr (now {self.parts.config.optim.lr:g})"
            )
        if self.best is not None and found.rank <= self.best.best.rank:
            self.best = replace(self.best, samples=samples, train_s=self.train_s)
            return
        self.best = Finetuned(found, epoch + 1, step, samples, self.train_s, None)
        stays = self.average is None and step == self.parts.config.train.train_iters
        self.best_weights = {} if stays else weights.remember(self.parts)
        if self.settings.save is not None:
            self._save(self.settings.save, step, found)
            self.best = replace(self.best, saved=self.saved)

    def _save(self, save: Path, step: int, found: DevResult) -> None:
        """Save the weights, unless an earlier run left better ones."""
        kept = self.kept
        if kept is not None and found.score < kept.score:
            self.reports.note(
                f"not saved: {kept.directory} of an earlier run is better, {kept.score:.4f} on average to "
                f"{found.score:.4f}; give another --save to keep this one"
            )
            return
        if made_again := self.settings.renew_hold():
            self.reports.note(made_again)
        self.saved = weights.save(self.parts, save, step, self._document(found.metrics))
        self.reports.note(f"saved {self.saved}, the best so far")

    def take_back_best(self) -> None:
        """Put the best weights into the model, where they are not those of the last update."""
        self.parts.engine.finish_update()
        if self.best_weights:
            weights.restore(self.parts, self.best_weights)

    def _document(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        about = {"max_length": self.settings.max_length, "dev_digests": self.data.dev_digests}
        return weights.task_document(self.settings.task, metrics=metrics, **about)


def grouped(samples: Encoded, planned: PlannedStep) -> GroupedSamples:
    """The samples of a step, or of a rank's part of it, each batch padded to its own length."""
    batches = planned.batches
    return GroupedSamples(tuple(samples.batch(one.indices_R, one.weights_R, one.length) for one in batches))


def measure_dev(
    parts: TrainingSetup,
    dev: Mapping[str, Encoded],
    settings: FinetuneSettings,
    log: Callable[[str], None],
    before_batch: Callable[[], None],
) -> DevResult:
    """The metrics on all dev files with the weights that are in the model; collective over all ranks.

    `before_batch` is called before each batch and may raise to give up.
    """
    task = settings.task
    metrics: dict[str, float] = {}
    losses: list[tuple[float, int]] = []
    for ending, samples in dev.items():
        assert samples.labels_N is not None, f"dev file {ending!r} was read without labels"
        pace = Pace(f"measuring dev{ending}", samples.lengths_N, log)
        found_NC = scores(
            parts,
            samples,
            num_outputs=task.num_outputs,
            multiple=settings.multiple,
            pace=pace,
            before_batch=before_batch,
        )
        metrics |= {f"{n}{ending}": v for n, v in metrics_of(found_NC, samples.labels_N, task).items()}
        losses.append((mean_loss(found_NC, samples.labels_N), len(samples)))
    return DevResult(metrics, _mean(losses))


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    return math.fsum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def _line(when: str, found: DevResult) -> str:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
    return f"dev {when}: {metrics}, loss {found.loss:.4f}"
