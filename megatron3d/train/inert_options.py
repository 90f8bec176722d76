"""What the options ask for and this run will not do, as lines before it starts: nobody should find out at the end.

Each line is about an option whose effect somebody counts on and which has none here, because the run is too short, is
finished already, or lacks the data. Contradictions between options are errors, found earlier by `config/check.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron3d.comm.device import likely_device_type
from megatron3d.config.options import BY_NAME
from megatron3d.config.run import RunConfig
from megatron3d.data.splits import parse_split
from megatron3d.optim.schedule import ScheduleSettings
from megatron3d.train.inert_data_options import inert_data_options
from megatron3d.train.state import Progress


@dataclass(frozen=True)
class InertOptions:
    """A run as it starts: where it stands, the number of its last step, its schedule, and which splits have data."""

    config: RunConfig
    progress: Progress
    last_step: int
    schedule: ScheduleSettings
    has_valid: bool
    has_test: bool

    def lines(self) -> list[str]:
        """A sentence for each option without effect."""
        of_data = [*self._sample_order(), *self._fim(), *self._data_options()]
        without_steps = [*self._no_data(), *self._wandb(), *self._context(), *self._fp8(), *self._overlap(), *of_data]
        if self.progress.step >= self.last_step:
            return [self._finished(), *without_steps]
        return [*without_steps, *self._intervals(), *self._warmup(), *self._single_steps(), *self._replicas()]

    def _finished(self) -> str:
        train, progress = self.config.train, self.progress
        if train.train_iters is not None:
            return (
                f"nothing is left to train: step {progress.step} is made, and --train-iters is {train.train_iters}; "
                "raise it to train on"
            )
        by_tokens = train.train_tokens is not None and ("train", "train_samples") in self.config.as_given
        if by_tokens:
            return (
                f"nothing is left to train: {progress.consumed_tokens} of --train-tokens {train.train_tokens} are "
                "consumed; raise it to train on"
            )
        return (
            f"nothing is left to train: {progress.consumed_samples} of --train-samples {train.train_samples} are "
            "consumed, and no whole batch is left; raise it to train on"
        )

    def _no_data(self) -> Iterator[str]:
        """Evaluation is asked for by default, so that one line says where none will be."""
        data, eval_iters = self.config.data, self.config.train.eval_iters
        if eval_iters == 0:
            return
        by_files = bool(data.train_data_path)
        if not self.has_valid:
            why = "--valid-data-path is not given" if by_files else f"--split is {data.split}"
            yield (
                f"there is no validation data ({why}), so nothing is evaluated while training; give more documents or "
                "another split, or --eval-iters 0 if none is wanted"
            )
        if not self.has_test and not by_files and parse_split(data.split)[2] > 0:
            yield f"there is no test data (--split is {data.split}), so nothing is evaluated at the end but validation"

    def _wandb(self) -> Iterator[str]:
        train = self.config.train
        for name in ("wandb_entity", "wandb_exp_name") if not train.wandb_project else ():
            if value := BY_NAME[name].value_in(self.config):
                yield f"{BY_NAME[name].spelling} {value} has no effect without --wandb-project: nothing is sent there"

    def _context(self) -> Iterator[str]:
        if self.config.parallel.context_parallel_size > 1:
            return
        for name in ("cp_cut", "cp_comm_type", "hierarchical_context_parallel_sizes", "cp_gather_again"):
            option = BY_NAME[name]
            if option.value_in(self.config) != option.default:
                yield f"{option.spelling} has no effect without --context-parallel-size above 1: samples are not cut"

    def _fp8(self) -> Iterator[str]:
        train, parallel = self.config.train, self.config.parallel
        if train.fp8_format is not None and likely_device_type(parallel.device) == "cpu":
            yield (
                f"--fp8-format {train.fp8_format} saves no time on a CPU, which has no products of fp8: operands are "
                "cast to fp8 and multiplied in bf16, so that losses are those of fp8"
            )

    def _overlap(self) -> Iterator[str]:
        parallel, chunks = self.config.parallel, BY_NAME["tp_comm_overlap_chunks"]
        if parallel.tp_comm_overlap and parallel.tensor_model_parallel_size == 1:
            needs = "--tensor-model-parallel-size above 1: layers communicate nothing"
            yield f"--tp-comm-overlap has no effect without {needs}"
        elif not parallel.tp_comm_overlap and parallel.tp_comm_overlap_chunks != chunks.default:
            yield f"{chunks.spelling} {parallel.tp_comm_overlap_chunks} has no effect without --tp-comm-overlap"
        positions = self.config.model.seq_length // parallel.context_parallel_size
        positions //= parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        if parallel.overlap_chunks > positions:
            yield (
                f"{chunks.spelling} {parallel.tp_comm_overlap_chunks} is {positions} here: a rank has no more "
                "positions of a micro-batch"
            )

    def _sample_order(self) -> Iterator[str]:
        data, option = self.config.data, BY_NAME["mid_level_dataset_surplus"]
        if data.sample_order != "megatron" and option.value_in(self.config) != option.default:
            yield (
                f"{option.spelling} {data.mid_level_dataset_surplus:g} has no effect without --sample-order megatron: "
                "there is no number of samples to add to"
            )

    def _fim(self) -> Iterator[str]:
        options = [one for name, one in BY_NAME.items() if name.startswith("fim_") and name != "fim_data"]
        given = [one for one in options if one.value_in(self.config) != one.default]
        if given and not self.config.data.fim_data:
            words = ", ".join(f"{one.spelling} {one.value_in(self.config)}" for one in given)
            yield f"{words} has no effect without --fim-data: no sample is permuted"

    def _data_options(self) -> Iterator[str]:
        run = self.config
        return inert_data_options(run.data, run.model, train=run.train, curriculum=run.curriculum, lengths=run.lengths)

    def _next(self, interval: int) -> int:
        """The first multiple of an interval that is still to come."""
        return (self.progress.step // interval + 1) * interval

    def _intervals(self) -> Iterator[str]:
        train, checkpoint, last = self.config.train, self.config.checkpoint, self.last_step
        if train.exit_interval is not None and self._next(train.exit_interval) >= last:
            yield f"--exit-interval {train.exit_interval} stops nothing: the run ends with step {last} before it"
        interval = checkpoint.save_interval if checkpoint.save is not None else None
        if interval is not None and self._next(interval) > last:
            yield f"--save-interval {interval} is longer than the run: it saves once, after step {last}"
        if checkpoint.async_save and not checkpoint.saves_asynchronously:
            absent = "--save" if checkpoint.save is None else "--save-interval"
            yield f"--async-save has no effect without {absent}: the save at the end of a run is waited for"
        evaluates = self.has_valid and train.eval_iters > 0
        is_given = train.eval_interval != BY_NAME["eval_interval"].default
        if evaluates and is_given and self._next(train.eval_interval) > last:
            yield f"--eval-interval {train.eval_interval} is longer than the run: it evaluates once, after step {last}"

    def _warmup(self) -> Iterator[str]:
        train, schedule = self.config.train, self.schedule
        unit = "samples" if train.train_samples is not None else "iterations"
        length = train.train_samples if train.train_samples is not None else train.train_iters
        if schedule.unit == "tokens":
            unit, length = "tokens", train.train_tokens
        if schedule.unit == unit and length is not None and schedule.warmup >= length:
            yield (
                f"the warm-up of {schedule.warmup:g} {unit} is longer than the run of {length}: the learning rate does "
                f"not reach --lr {schedule.lr:g}"
            )

    def _single_steps(self) -> Iterator[str]:
        train, left = self.config.train, self.last_step - self.progress.step
        if train.profile_pipeline is not None and train.profile_pipeline_step > left:
            yield (
                f"--profile-pipeline records nothing: its step {train.profile_pipeline_step} "
                f"(--profile-pipeline-step) does not come, as {left} are left; choose one of them"
            )
        if train.profile and train.profile_step_start >= self.last_step:
            yield (
                f"--profile records nothing: the last iteration is {self.last_step - 1}, counted from 0, and "
                f"--profile-step-start is {train.profile_step_start}; choose an earlier one"
            )
        if train.profile and train.profile_step_end <= self.progress.step < self.last_step:
            yield (
                f"--profile records nothing: the run goes on with iteration {self.progress.step}, counted from 0, and "
                f"--profile-step-end is {train.profile_step_end}; choose a later one"
            )
        beyond = [word for word in train.iterations_to_skip if int(word) >= self.last_step]
        if beyond:
            yield (
                f"--iterations-to-skip {' '.join(beyond)} skips nothing: the last iteration is {self.last_step - 1}, "
                "counted from 0"
            )

    def _replicas(self) -> Iterator[str]:
        interval = self.config.train.check_weight_hash_across_dp_replicas_interval
        if interval is None:
            return
        if self.config.parallel.world_size == 1:
            reason = "one rank holds everything once"
        elif self._next(interval) > self.last_step:
            reason = "it is longer than the run, which compares before each save alone"
        else:
            return
        yield f"--check-weight-hash-across-dp-replicas-interval {interval} compares nothing: {reason}"
