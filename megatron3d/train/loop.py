"""The training loop: step, report, evaluate, save, stop.

It knows when things happen; what they are is in `step.py`, `evaluate.py`, `state.py` and `reports.py`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron3d.checkpoint.async_save import AsyncSave
from megatron3d.checkpoint.directory import step_of
from megatron3d.config.batch_size import batch_size_at
from megatron3d.config.lengths import SampleShape, sample_shape
from megatron3d.config.sections.data import DataConfig
from megatron3d.data.build import BertData, GPTData
from megatron3d.data.content import Content
from megatron3d.data.loader import GlobalBatches
from megatron3d.data.stream import SampleStream
from megatron3d.errors import ConfigError, Megatron3dError, NumericsError, StopRequested
from megatron3d.optim.schedule import ScheduleSettings
from megatron3d.train import state
from megatron3d.train.async_saves import AsyncSaves
from megatron3d.train.attention import AttentionUse
from megatron3d.train.compare import agreed_content
from megatron3d.train.deferred_failure import DeferredFailure, PreparedBatches
from megatron3d.train.evaluate import Evaluation, evaluate
from megatron3d.train.held import held_directory
from megatron3d.train.inert_options import InertOptions
from megatron3d.train.launch import RunContext
from megatron3d.train.profile import recorder_of_step, write_recorded
from megatron3d.train.reports import Reports
from megatron3d.train.retention import Retention
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.state import Progress, Restored
from megatron3d.train.step import Rates, train_step
from megatron3d.train.step_clock import StepClock
from megatron3d.train.step_profile import DATA, StepProfiler
from megatron3d.train.stopping import agreed_reason, first_reason, signal_reason, stop_while_starting
from megatron3d.train.training_data import TrainingData, blend_table, samples_of_run, training_data


@dataclass(frozen=True)
class Streams:
    """Readers of the three splits of `data`; None where a split is empty. `batches` makes one of any of its streams,
    which the caller closes."""

    data: GPTData | BertData
    train: GlobalBatches
    valid: GlobalBatches | None
    test: GlobalBatches | None
    batches: Callable[[SampleStream], GlobalBatches]

    def continue_training(self, stream: SampleStream) -> None:
        """Read training samples from another stream from now on, that of a run that is resumed."""
        self.train.read_by(_reader_of(self.data, stream))


def _reader_of(data: GPTData | BertData, stream: SampleStream) -> Callable[[int, int], Any]:
    make_reader: Callable[[Any], Callable[[int, int], Any]] = data.reader  # of streams of the data's own kind
    return make_reader(stream)


@contextmanager
def open_streams(data: GPTData | BertData, options: DataConfig) -> Iterator[Streams]:
    """Readers of the splits, closed at the end of the block."""

    def batches(stream: SampleStream) -> GlobalBatches:
        return GlobalBatches(_reader_of(data, stream), num_workers=options.num_workers)

    if data.train is None:
        raise ConfigError("there is no training data; give --data-path, --train-data-path or --mock-data")
    train = batches(data.train)
    valid, test = (None if stream is None else batches(stream) for stream in (data.valid, data.test))
    try:
        yield Streams(data, train, valid, test, batches)
    finally:
        for one in (train, valid, test):
            if one is not None:
                one.close()


def train(parts: TrainingSetup, streams: Streams, context: RunContext) -> Progress:
    """Train from wherever the checkpoints stand to the end, and return the progress made.

    Args:
        parts: the rank's model and optimizer, with the initial weights.
        streams: readers of the data.
        context: learns the step, for reports of how the run ended, and knows whether the run was asked to stop.

    Raises:
        StopRequested: the run was asked to stop; it has saved if it saves at all.
    """
    config = parts.config
    content = agreed_content(config.data, config.model, config.curriculum, parts.mesh.world.group)
    save = parts.config.checkpoint.save
    with held_directory(Path(save) if save else None, parts.mesh) as renew:
        stop_while_starting(context, parts.mesh)
        restored = state.restore(parts, content)
        context.step = restored.progress.step
        training = training_data(
            restored, content, streams.data, may_differ=parts.config.checkpoint.override_sample_order
        )
        if training.stream is not None:
            streams.continue_training(training.stream)
        stop_while_starting(context, parts.mesh)
        with Reports(parts, restored, context) as reports:
            newest = restored.source if reports.resumed_in_place else None
            retention = Retention(parts.config.checkpoint, parts.mesh, newest=newest, note=reports.note)
            loop = _Loop(parts, streams, reports, context, retention, content, restored, training, renew)
            try:
                with closing(loop):
                    loop.run()
            except Exception as error:
                error.add_note(f"on {parts.mesh}, after step {loop.progress.step}")
                if isinstance(error, NumericsError) and (hint := retention.hint()):
                    raise _with_hint(error, hint) from error
                raise
            return loop.progress


def _with_hint(error: NumericsError, hint: str) -> NumericsError:
    """The same error with what to do about the checkpoints."""
    hinted = NumericsError(f"{error}; {hint}")
    for note in error.__notes__:
        hinted.add_note(note)
    return hinted


@dataclass
class _Loop:
    parts: TrainingSetup
    streams: Streams
    reports: Reports
    context: RunContext
    retention: Retention
    content: Content
    restored: Restored
    training: TrainingData
    renew_hold: Callable[[], str | None]
    schedule: ScheduleSettings = field(init=False)
    progress: Progress = field(init=False)
    old_step: int = field(init=False)  # after which the layers' weights were made, while a delayed update is due
    failure: DeferredFailure = field(init=False)
    batches: PreparedBatches = field(init=False)
    profiler: StepProfiler = field(init=False)
    clock: StepClock = field(init=False)
    async_saves: AsyncSaves | None = None
    saved_step: int = -1  # the newest checkpoint's, or that of a save under way
    evaluated_step: int = -1
    steps_made: int = 0

    def __post_init__(self) -> None:
        self.schedule, self.progress = self.restored.schedule, self.restored.progress
        self.old_step = self.progress.step - 1
        self.failure = DeferredFailure(self.parts.mesh)
        self.batches = PreparedBatches(self.streams.train, self.parts.mesh, self.failure)
        self.profiler = StepProfiler(self.parts.config.train, self.parts.mesh, self.parts.model.device)
        self.clock = StepClock(self.parts.model.device)
        if self.parts.config.checkpoint.saves_asynchronously:
            self.async_saves = AsyncSaves(self.parts.mesh, published=self._published, note=self.reports.note)

    def run(self) -> None:
        """Train to the end, or to where the run is asked to stop."""
        try:
            self._run()
        except NumericsError:
            # It is one of all ranks, after the same step, so that a save under way can be published as if it had been
            # waited for. No such thing is known of other errors: those end the processes and with them the save.
            with suppress(Megatron3dError):
                self._wait_for_save("the run ends")
            raise

    def close(self) -> None:
        """End the process that writes checkpoints."""
        if self.async_saves is not None:
            self.async_saves.close()

    def _run(self) -> None:
        config = self.parts.config
        dp, seq_length = config.parallel.data_parallel_size, config.model.seq_length
        last = state.last_step(config.train, dp, self.progress, seq_length=seq_length)
        self.saved_step = self.progress.step if self.reports.resumed_in_place else -1
        is_finished_already = self.saved_step >= last
        self._look_ahead(last)
        if self.restored.evaluation_due:
            self._evaluate()
            self.saved_step = -1  # the checkpoint that is there would have it made once more
        while self.progress.step < last:
            with self.profiler.step(self.progress.step):
                votes, reason = self._step(last)
            step = self.progress.step
            compiled = [] if self.parts.compiled is None else self.parts.compiled.news(step)
            for line in (*compiled, *self.profiler.written(step, is_last=step >= last)):
                self.reports.note(line)
            self._publish_save()
            if step % config.train.eval_interval == 0 and step < last:
                self._evaluate()
            check_interval = config.train.check_weight_hash_across_dp_replicas_interval
            if check_interval is not None and step % check_interval == 0:
                self.clock.pause()
                state.check_replicas(self.parts, step)
            if config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0:
                self._save_at_interval()
            exits = self._exits_after(step)
            if (votes or exits) and step < last:
                interval = f"--exit-interval {config.train.exit_interval} is over"
                self._stop((first_reason(reason, self.parts.mesh.world) if votes else None) or interval)
        # A finished run that is started again was evaluated before its last checkpoint was saved.
        is_proved = not is_finished_already and self.evaluated_step != last and self._evaluate()
        self._finish(is_proved)
        self.reports.end()
        self.parts.engine.finish_update()  # only now: the last checkpoint has it due, for a run that goes on longer
        self.failure.raise_on_all_ranks(self._saved())

    def _look_ahead(self, last: int) -> None:
        """Report which attention runs, what the run will read, and what the options ask for and it will not do."""
        for line in self._attention().lines():
            self.reports.note(line)
        training, dp = self.training, self.parts.config.parallel.data_parallel_size
        if training.blend is not None and self.streams.data.corpora is not None:
            in_all = samples_of_run(self.parts.config.train, self.progress, last, dp)
            counts = {"consumed": self.progress.consumed_samples, "in_all": in_all}
            for line in (*training.blend.lines, *blend_table(training.blend, self.streams.data.corpora, **counts)):
                self.reports.note(line)
        has_valid, has_test = self.streams.valid is not None, self.streams.test is not None
        for line in InertOptions(self.parts.config, self.progress, last, self.schedule, has_valid, has_test).lines():
            self.reports.note(line)

    def _attention(self) -> AttentionUse:
        config, model = self.parts.config, self.parts.model
        within_documents, is_cut = config.data.reset_attention_mask, config.parallel.context_parallel_size > 1
        return AttentionUse(config.model, config.train, model.dtype, model.device, within_documents, is_cut)

    def _exits_after(self, step: int) -> bool:
        interval = self.parts.config.train.exit_interval
        return interval is not None and step % interval == 0

    def _reason_to_stop(self) -> str | None:
        """Why this rank wants to stop, if it does."""
        if self.failure.reason is not None:
            return self.failure.reason
        limit_min = self.parts.config.train.exit_duration_in_mins
        # The time limit of a job has no regard for how long the start takes.
        if limit_min is not None and time.monotonic() - self.context.launch.started_s > limit_min * 60.0:
            return signal_reason(self.context) or f"--exit-duration-in-mins {limit_min:g} is over"
        return signal_reason(self.context)

    def _prepare_next(self, consumed_samples: int, last: int) -> None:
        """Read the batch of the step after this one, so that this step's vote knows if it cannot be read.

        Iterations that are left out have no vote, so it is the batch after them that is read.
        """
        step, train, readers = self.progress.step + 1, self.parts.config.train, self.parts.mesh.batch
        while step < last and not self._exits_after(step):
            size = batch_size_at(train, consumed_samples, readers.size)
            if not train.skips(step):
                self.batches.prepare(consumed_samples, size)
                return
            step, consumed_samples = step + 1, consumed_samples + size

    def _step(self, last: int) -> tuple[int, str | None]:
        """Make one step and report it; returns how many ranks want to stop, and why this one does, if so."""
        config, readers, before = self.parts.config, self.parts.mesh.batch, self.progress
        size = batch_size_at(config.train, before.consumed_samples, readers.size)
        at = before.of_updates()
        rates = Rates(self.schedule.lr_at(**at), self.schedule.weight_decay_at(**at))
        shape = sample_shape(config.train, before.step, config.model.seq_length)
        if config.train.skips(before.step):
            return self._leave_out(size, shape, rates), None
        self.clock.begin()
        with self.profiler.part(DATA):
            batch = self.batches.read(before.consumed_samples, size, readers.rank, readers.size)
            self._prepare_next(before.consumed_samples + size, last)
        reason = self._reason_to_stop()
        loss_scale = self.parts.scaler.scale
        self.steps_made += 1
        recorder = recorder_of_step(self.parts, self.steps_made)
        computed_with = self.old_step if self.parts.engine.is_update_due else before.step
        result = train_step(
            self.parts,
            batch,
            rates,
            step=before.step,
            consumed_samples=before.consumed_samples,
            wants_stop=reason is not None,
            recorder=recorder,
        )
        elapsed_s = self.clock.end()
        self.progress = before.after(size, tokens=size * shape.tokens, skipped=result.skipped)
        self.context.step = self.progress.step
        numbers = {"loss_scale": loss_scale, "batch_size": size, "elapsed_s": elapsed_s}
        self.failure.keep(lambda: self.reports.step(self.progress, result, rates, shape, **numbers))
        if result.is_finite:
            self.retention.proved(computed_with)
        if not result.skipped:
            self.old_step = before.step
        if recorder is not None and (written := write_recorded(self.parts, recorder, self.progress.step)):
            self.reports.note(written)
        return result.stop_votes, reason

    def _leave_out(self, batch_size: int, shape: SampleShape, rates: Rates) -> int:
        """Let an iteration's samples count as consumed without training on them; nobody is asked whether to stop."""
        self.clock.pause()
        self.progress = self.progress.after(batch_size, tokens=batch_size * shape.tokens, skipped=True)
        self.context.step = self.progress.step
        self.failure.keep(lambda: self.reports.left_out(self.progress, rates, batch_size=batch_size))
        return 0

    def _evaluate(self) -> bool:
        """Evaluate if there is something to evaluate on; returns whether that showed that the weights are good."""
        found = self._evaluate_on(self.streams.valid, is_due_later=True)
        self.evaluated_step = self.progress.step
        if found is None:
            return False
        by_source = self._evaluate_sources()
        self.failure.keep(lambda: self.reports.evaluation(self.progress, found, by_source))
        return math.isfinite(found.loss)

    def _evaluate_sources(self) -> dict[str, Evaluation]:
        """Evaluate on each validation corpus that is to be evaluated by itself."""
        found = {}
        for name, stream in self.streams.data.valid_sources.items():
            with self.streams.batches(stream) as batches:
                found[name] = self._evaluate_on(batches, is_due_later=True)
        return {name: one for name, one in found.items() if one is not None}

    def _evaluate_on(self, batches: GlobalBatches | None, *, is_due_later: bool) -> Evaluation | None:
        """Evaluate, if that is asked for and there is data; a stop asked for meanwhile is not kept waiting.

        An evaluation that is given up leaves no report. If `is_due_later`, the checkpoint then says that the run that
        resumes from it makes the evaluation first.
        """
        num_batches = self.parts.config.train.eval_iters
        if batches is None or num_batches == 0:
            return None

        self.clock.pause()
        prepared, numbers = PreparedBatches(batches, self.parts.mesh, self.failure), itertools.count()
        size = self.parts.config.train.global_batch_size

        def give_up_if_asked() -> None:
            prepared.prepare(next(numbers) * size, size)
            reason = agreed_reason(self._reason_to_stop(), self.parts.mesh)
            if reason is not None:
                self._stop(reason, evaluation_due=is_due_later)

        with self.reports.timed("evaluations_s"):
            return evaluate(self.parts, prepared, num_batches=num_batches, before_batch=give_up_if_asked)

    def _save_at_interval(self) -> None:
        """Save as the run goes on: with --async-save begin to, once the save before is over."""
        self.clock.pause()
        if self.async_saves is None:
            self._save()
            return
        self._wait_for_save("the next save is due")
        with self.reports.timed("saves_s"):
            has_begun = self.async_saves.begin(self._begin_save)
        self.saved_step = self.progress.step if has_begun else -1

    def _begin_save(self, background: AsyncSave) -> Path:
        if made_again := self.renew_hold():
            self.reports.note(made_again)
        spent = self.reports.time_spent()
        more = {"background": background, "time_spent": spent, "blend": self.training.history}
        return state.save(self.parts, self.progress, self.schedule, self.content, **more)

    def _published(self, path: Path, *, waited_s: float, took_s: float) -> None:
        self.retention.saved(path)
        self.reports.saved_meanwhile(path, step_of(path), waited_s=waited_s, took_s=took_s)

    def _publish_save(self) -> None:
        if self.async_saves is not None:
            with self.reports.timed("saves_s"):
                is_well = self.async_saves.publish_written()
            self.saved_step = self.saved_step if is_well else -1

    def _wait_for_save(self, why: str) -> None:
        if self.async_saves is not None:
            with self.reports.timed("saves_s"):
                is_well = self.async_saves.wait(why)
            self.saved_step = self.saved_step if is_well else -1

    def _save(self, *, evaluation_due: bool = False) -> None:
        """Save and wait for it; a save under way is waited for, and may be the one that is wanted."""
        self.clock.pause()
        self._wait_for_save("the run ends")
        if self.parts.config.checkpoint.save and self.saved_step != self.progress.step:
            if made_again := self.renew_hold():
                self.reports.note(made_again)
            began_s = time.monotonic()
            path = state.save(
                self.parts,
                self.progress,
                self.schedule,
                self.content,
                evaluation_due=evaluation_due,
                time_spent=self.reports.time_spent(),
                blend=self.training.history,
            )
            self.saved_step = self.progress.step
            self.retention.saved(path)
            self.reports.saved(path, self.progress.step, elapsed_s=time.monotonic() - began_s)

    def _stop(self, reason: str, *, evaluation_due: bool = False) -> None:
        self._save(evaluation_due=evaluation_due)
        self.failure.raise_on_all_ranks(self._saved())
        self.reports.end()
        raise StopRequested(f"stopped after step {self.progress.step} because {reason}; {self._saved()}")

    def _saved(self) -> str:
        save = self.parts.config.checkpoint.save
        return f"saved at {save}; start again to go on" if save else "nothing is saved, as there is no --save"

    def _finish(self, is_proved: bool) -> None:
        self._save()
        found = self._evaluate_on(self.streams.test, is_due_later=False)
        if found is not None:
            self.failure.keep(lambda: self.reports.test(self.progress.step, found))
            is_proved = is_proved or math.isfinite(found.loss)
        if not is_proved and self.retention.waits:
            # No step will follow, so a batch's forward stands for it.
            batches = PreparedBatches(self.streams.train, self.parts.mesh, self.failure)
            # The last samples of this run: earlier ones may be of corpora that have left the blend, and Megatron-LM's
            # order has no later ones.
            size, begun_at = self.parts.config.train.global_batch_size, self.restored.progress.consumed_samples
            first = max(self.progress.consumed_samples - size, begun_at)
            batches.prepare(first, size)
            self.failure.raise_on_all_ranks(self._saved())
            is_proved = math.isfinite(evaluate(self.parts, batches, num_batches=1, first_sample=first).loss)
        if is_proved:
            self.retention.proved(self.progress.step)
