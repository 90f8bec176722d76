"""Reports: everything a run shows people while it runs: log lines, metrics file, TensorBoard, Weights & Biases.

Only rank 0 writes. Collectives happen at the start alone, to find the rank that holds most.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron3d.checkpoint.directory import size_of
from megatron3d.comm.collectives import all_reduce
from megatron3d.comm.device import device_name, peak_memory_bytes
from megatron3d.config.lengths import SampleShape, describe_lengths
from megatron3d.config.serialize import to_dict
from megatron3d.errors import DataError
from megatron3d.models.flops import layer_flops, peak_tflops, pretraining_flops
from megatron3d.optim.build import state_bytes
from megatron3d.pipeline.simulate import simulate
from megatron3d.pipeline.split.stages import describe
from megatron3d.planner.ledger import first_microbatches, ledger_of_rank
from megatron3d.planner.memory import RankModel
from megatron3d.planner.stage_records import StageRecords
from megatron3d.train.async_saves import save_copy_note
from megatron3d.train.dropout import dropout_note
from megatron3d.train.evaluate import Evaluation
from megatron3d.train.expert_load import expert_notes
from megatron3d.train.goodput import Goodput, Kind, TimeSpent, spent_when_resuming
from megatron3d.train.launch import RunContext
from megatron3d.train.metrics import StartRecord, StepRecord, salvage
from megatron3d.train.progress import ProgressReporter, StepReport, format_bytes, format_count
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.speed import Devices
from megatron3d.train.state import Progress, Restored, last_step
from megatron3d.train.step import Rates, StepResult
from megatron3d.train.trackers import Trackers
from megatron3d.zero.volume import pipeline_cost, step_volume

TERA = 1e12


class Reports:
    """A context manager; every rank makes one, and those of ranks above 0 write nothing."""

    def __init__(self, parts: TrainingSetup, restored: Restored, context: RunContext) -> None:
        """`context` knows when this process began, and where the run before ended."""
        self.parts, self.restored = parts, restored
        options = parts.config.checkpoint
        source = restored.source
        self.resumed_in_place = bool(source and options.save and source.parent == Path(options.save))
        self._is_writer = parts.mesh.rank == 0
        self._exits = ExitStack()
        self._trackers = Trackers(parts.config.train)
        self._devices = devices_of(parts)
        model, frozen = parts.config.model, parts.config.train.freeze_params
        self._flops = pretraining_flops(model, frozen)
        self._layer_flops = layer_flops(model, frozen) if parts.random_ltd else {}
        self._progress: ProgressReporter | None = None
        self._by_source = ""
        self._ended_after = context.ended_after if self.resumed_in_place else None
        self._started_s = context.launch.started_s
        self._goodput = Goodput(restored.time_spent, started_s=self._started_s)

    def __enter__(self) -> Reports:
        """Open the files and report what starts."""
        # All that is collective comes before the ranks part.
        record = start_record(self.parts, predicted=predicted_bytes(self.parts))
        frozen = frozen_parameters(self.parts)
        if not self._is_writer:
            return self
        resumed = self.restored.progress
        spent = self._spent_before()
        self._goodput = Goodput(spent, started_s=self._started_s)
        self._exits.callback(self._trackers.close)
        self._trackers.open(
            record,
            run=to_dict(self.parts.config),
            resumed_step=resumed.step,
            resumed_samples=resumed.consumed_samples,
            evaluation_due=self.restored.evaluation_due,
            more={"wall_s": spent.wall_s, "lost_steps": spent.lost_steps},
        )
        self._progress = self._exits.enter_context(self._reporter(resumed))
        self._introduce(record, frozen)
        if lost := spent.lost_steps - self.restored.time_spent.lost_steps:
            steps = "step was" if lost == 1 else "steps were"
            self.note(f"{lost} {steps} lost since the checkpoint of step {resumed.step} and will be made again")
        if spent.wall_s:
            self.note(f"before this resume: {spent.summary()}")
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files."""
        self._exits.close()

    def step(
        self,
        progress: Progress,
        result: StepResult,
        rates: Rates,
        shape: SampleShape,
        *,
        loss_scale: float,
        batch_size: int,
        elapsed_s: float,
    ) -> None:
        """Report one step, which made `shape` of each sample; like the rates, `loss_scale` is the one the step used,
        not the one that follows."""
        if self._progress is None:
            return
        self._goodput.add("steps_s", elapsed_s)
        spent = self._goodput.spent()
        config = self.parts.config
        is_fp16 = config.optim.precision == "fp16"
        scale = loss_scale if is_fp16 else None
        tokens = batch_size * shape.tokens
        kept = self._kept_by_layer(progress.step, shape.length)
        passed_by = shape.rows * sum(shape.length - count for count in kept.values())  # of each sample
        losses = {f"{name}_loss": loss for name, loss in result.losses.items()} if len(result.losses) > 1 else {}
        report = StepReport(
            step=progress.step,
            loss=result.loss,
            lr=rates.lr,
            grad_norm=result.grad_norm,
            tokens=tokens,
            flops=batch_size * shape.rows * (self._flops.of([shape.length]) - self._flops_saved(kept, shape.length)),
            elapsed_s=elapsed_s,
            skipped=result.skipped,
            loss_scale=scale,
            memory_bytes=peak_memory_bytes(self.parts.model.device),
            losses=losses,
            expert_loads=result.expert_loads,
            layer_tokens=tokens * config.model.num_layers - batch_size * passed_by if kept else None,
            num_layers=config.model.num_layers,
        )
        self._progress.step(report)
        consumed = {"consumed_samples": progress.consumed_samples, "consumed_tokens": progress.consumed_tokens}
        counts = {**consumed, "batch_size": batch_size}
        record = step_record(report, self._devices, **counts)
        if config.train.length_levels:
            record = replace(record, sample_length=shape.length)
        so_far = {"goodput": spent.goodput, "wall_s": spent.wall_s, "lost_steps": spent.lost_steps}
        self._trackers.step(replace(record, **so_far))

    def _kept_by_layer(self, step: int, length: int) -> Mapping[int, int]:
        """How many positions of a sample the layers saw in the step of this number, of those that drop any."""
        dropping = self.parts.random_ltd
        return {} if dropping is None else dropping.kept_at(step - 1, length)

    def _flops_saved(self, kept: Mapping[int, int], length: int) -> float:
        """Operations that a sample of this length costs less where layers see so many positions of it."""
        costs = self._layer_flops
        return sum(costs[layer].of([length]) - costs[layer].of([count]) for layer, count in kept.items())

    def left_out(self, progress: Progress, rates: Rates, *, batch_size: int) -> None:
        """Report an iteration of --iterations-to-skip: its step, and samples that count as consumed."""
        if self._progress is None:
            return
        step, consumed = progress.step, progress.consumed_samples
        self.note(f"step {step} is left out by --iterations-to-skip {step - 1}: its {batch_size} samples are not used")
        self._progress.step(
            StepReport(step, math.nan, rates.lr, grad_norm=None, tokens=0, flops=0.0, elapsed_s=0.0, skipped=True)
        )
        record = StepRecord(step, None, None, rates.lr, consumed, 0.0, skipped=True, batch_size=batch_size)
        record = replace(record, consumed_tokens=progress.consumed_tokens)
        self._trackers.step(record)

    def evaluation(
        self, progress: Progress, found: Evaluation, by_source: Mapping[str, Evaluation] = MappingProxyType({})
    ) -> None:
        """Report the losses, and accuracies where there are any, on the validation split after a step, and on each of
        its corpora that was evaluated by itself."""
        step, samples = progress.step, progress.consumed_samples
        more = {f"valid_{name}": value for name, value in found.scalars().items()}
        for source, one in by_source.items():
            scalars = {"loss": one.loss, **one.scalars()}
            more |= {f"valid_{name}/{source}": value for name, value in scalars.items()}
        if self._progress is not None:
            self._progress.evaluation(step, found.loss, more=found.scalars())
            for source, one in by_source.items():
                self._progress.evaluation(step, one.loss, name=f"validation on {source}", more=one.scalars())
            if by_source:
                losses = ", ".join(f"{source} {one.loss:.4f}" for source, one in by_source.items())
                self._by_source = f"after step {step}: {losses}"
            self._trackers.evaluation(step, found.loss, more, losses=found.losses, consumed_samples=samples)

    def test(self, step: int, found: Evaluation) -> None:
        """Report the same on the test split at the end."""
        if self._progress is not None:
            self._progress.evaluation(step, found.loss, name="test", more=found.scalars())
            more = {f"test_{name}": value for name, value in found.scalars().items()}
            self._trackers.draw(step, {"test_loss": found.loss, **more})

    def saved(self, path: Path, step: int, *, elapsed_s: float) -> None:
        """Report a checkpoint that was written, with the time that training waited for it."""
        if self._progress is None:
            return
        self._goodput.add("saves_s", elapsed_s)
        size = size_of(path)
        rate = f"{format_bytes(size)} in {elapsed_s:.2f} s, {size / elapsed_s / 1e9:.2f} GB/s"
        self._progress.note(f"saved {path} ({rate})")
        self._record_save(step, elapsed_s, size)

    def saved_meanwhile(self, path: Path, step: int, *, waited_s: float, took_s: float) -> None:
        """Report a checkpoint that was written while training went on, `took_s` after its step; the time that training
        waited for it is counted already (`timed`)."""
        if self._progress is None:
            return
        size = size_of(path)
        self._progress.note(
            f"saved {path} ({format_bytes(size)}, {took_s:.2f} s after its step, of which training waited "
            f"{waited_s:.2f} s)"
        )
        self._record_save(step, waited_s, size)

    def _record_save(self, step: int, waited_s: float, size: int) -> None:
        wall_s = self._goodput.spent().wall_s
        self._trackers.save(step, {"save_s": waited_s, "save_bytes": size, "wall_s": wall_s})

    def end(self) -> None:
        """Report the last validation loss of each source, where there are several, and where the time went."""
        if self._by_source:
            self.note(f"validation losses {self._by_source}")
        self.note(self.time_spent().summary())

    @contextmanager
    def timed(self, kind: Kind) -> Iterator[None]:
        """Count the time of a block that ends well."""
        began_s = time.monotonic()
        yield
        self._goodput.add(kind, time.monotonic() - began_s)

    def time_spent(self) -> TimeSpent:
        """The time of the run until now; rank 0 alone knows all of it."""
        return self._goodput.spent()

    def _spent_before(self) -> TimeSpent:
        """What the run has spent until this process; to be asked before the metrics file is cut back."""
        step, file = self.restored.progress.step, self.parts.config.train.metrics_file
        if not step:
            return self.restored.time_spent
        records: list[dict[str, Any]] = []
        if file:
            with suppress(OSError, DataError):  # a file that cannot be read is reported when it is opened to go on
                records, _ = salvage(Path(file))
        return spent_when_resuming(self.restored.time_spent, step, records, ended_after=self._ended_after)

    def note(self, text: str) -> None:
        """Write a line, on rank 0."""
        if self._progress is not None:
            self._progress.note(text)

    def _reporter(self, resumed: Progress) -> ProgressReporter:
        config = self.parts.config
        return ProgressReporter(
            last_step(config.train, config.parallel.data_parallel_size, resumed, seq_length=config.model.seq_length),
            sys.stdout,
            log_interval=config.train.log_interval,
            devices=self._devices,
            first_step=resumed.step,
            skipped_before=resumed.skipped,
        )

    def _introduce(self, record: StartRecord, frozen: str | None) -> None:
        held = ", ".join(f"{name} {format_bytes(size)}" for name, size in record.bytes_per_rank.items())
        self.note(f"{record.model}: {format_count(record.parameters)} parameters on {self.parts.mesh.layout}, {held}")
        parallel = self.parts.config.parallel
        if parallel.context_parallel_size > 1:
            kinds = ", ".join(dict.fromkeys(parallel.cp_comm_type)) or "allgather"
            self.note(f"samples are cut over context-parallel ranks: {parallel.context_cut}, attention by {kinds}")
        for line in expert_notes(self.parts.config.model):
            self.note(line)
        predicted = record.predicted_bytes_per_rank
        needed = ", ".join(f"{name} {format_bytes(predicted[name])}" for name in ("peak", "activations", "buffers"))
        self.note(f"predicted for a step on the fullest rank: {needed}")
        for line in save_copy_note(predicted["save_copy"], self.parts.model.device.type):
            self.note(line)
        source = self.restored.source
        plan = self.parts.model.rows.plan
        if plan.num_stages > 1:
            chosen = f" ({plan.why})" if plan.why else ""
            self.note(f"schedule {plan.order}{chosen}, {describe(plan.layers)}")
        for line in (frozen, sharing_cost(self.parts)):
            if line:
                self.note(line)
        if (precision := self.parts.config.train.fp32_matmul_precision) != "highest":
            self.note(f"products of fp32 matrices have torch's precision {precision!r} (--fp32-matmul-precision)")
        dropout = dropout_note(self.parts.config.model, self.parts.model.device.type)
        lengths = describe_lengths(self.parts.config.train, self.parts.config.model.seq_length)
        for line in (dropout, lengths):
            if line:
                self.note(line)
        if self.restored.damage:
            self.note(f"fell back to another checkpoint, because {self.restored.damage}")
        self.note(f"starting from {source} ({self.restored.why})" if source else "starting from the initial weights")
        for line in self.restored.lines:
            self.note(line)


def devices_of(parts: TrainingSetup) -> Devices:
    """The devices of a run, with the peak that `--peak-tflops` gives or the name of the device implies."""
    config = parts.config
    peak = config.train.peak_tflops or peak_tflops(device_name(parts.model.device), config.optim.precision)
    return Devices(parts.mesh.world.size, None if peak is None else peak * TERA)


def step_record(
    report: StepReport, devices: Devices, *, consumed_samples: int, consumed_tokens: int, batch_size: int
) -> StepRecord:
    """What the trackers get of a step that was made."""
    flops_per_s = devices.flops_per_s(report.flops, report.elapsed_s)
    return StepRecord(
        step=report.step,
        loss=report.loss,
        grad_norm=report.grad_norm,
        lr=report.lr,
        consumed_samples=consumed_samples,
        tokens_per_second=report.tokens / report.elapsed_s,
        skipped=report.skipped,
        loss_scale=report.loss_scale,
        batch_size=batch_size,
        consumed_tokens=consumed_tokens,
        step_time_s=report.elapsed_s,
        tflops_per_device=None if flops_per_s is None else flops_per_s / TERA,
        mfu=devices.mfu(report.flops, report.elapsed_s),
        peak_memory_bytes=report.memory_bytes,
        losses=report.losses,
        expert_loads=report.expert_loads,
        layer_tokens=report.layer_tokens,
    )


def start_record(parts: TrainingSetup, *, predicted: Mapping[str, int] | None = None) -> StartRecord:
    """What the run is made of; collective, because it names the largest bytes of any rank. `predicted` is given where
    the ledger knows the model."""
    config, layout = parts.config, parts.mesh.layout
    held = parts.engine.state_bytes()
    declared = parts.states.size_bytes + (held.beside if config.parallel.offload_optimizer == "none" else 0)
    on_device = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.master_weights + state_bytes(parts.optimizer) + declared,
    }
    offloaded = {"host": held.host, "files": held.files} if config.parallel.offload_optimizer != "none" else {}
    row = parts.model.rows.training(first_microbatches(config.train, config.parallel.data_parallel_size))
    degrees = {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "zero": config.parallel.zero_stage}
    if config.model.has_experts:
        degrees |= {"ep": layout.ep, "etp": layout.expert_tp}
    if layout.cp > 1:
        degrees |= {"cp": layout.cp}
    return StartRecord(
        model=config.model.traits.title,
        parameters=_num_parameters(parts, parts.engine.units),
        layout=degrees,
        bytes_per_rank=_largest(on_device | offloaded, parts),
        predicted_bytes_per_rank=dict(predicted or {}),
        schedule=parts.model.rows.plan.order,
        predicted_bubble=simulate(row.schedule).bubble_fraction,
    )


def predicted_bytes(parts: TrainingSetup) -> dict[str, int]:
    """What the ledger says of the rank that will hold most of each kind, by name; collective."""
    model, config = parts.model, parts.config
    row = model.rows.training(first_microbatches(config.train, config.parallel.data_parallel_size))
    held = RankModel(model.stages, {name: unit.layout for name, unit in parts.engine.units.items()})
    records = StageRecords(config, model.device.type)
    ledger = ledger_of_rank(model.rows.plan, (row.schedule, row.actions), held, parts.mesh.pp.rank, records)
    return _largest(ledger.rows(), parts)


def _largest(sizes: Mapping[str, int], parts: TrainingSetup) -> dict[str, int]:
    """The most of each kind that any rank has."""
    largest = all_reduce(torch.tensor([*sizes.values()], device=parts.model.device), parts.mesh.world, reduction="max")
    return dict(zip(sizes, largest.tolist(), strict=True))


def frozen_parameters(parts: TrainingSetup) -> str | None:
    """How many parameters of the whole model do not train, in a sentence; collective over the pipeline."""
    patterns, engine = parts.config.train.freeze_params, parts.engine
    if not patterns:
        return None
    count = _num_parameters(parts, engine.units.keys() - engine.trained.keys())
    return f"{format_count(count)} parameters are frozen (--freeze-params {' '.join(patterns)})"


def _num_parameters(parts: TrainingSetup, units: Iterable[str]) -> int:
    """Parameters of these units of every rank of the pipeline, a tied table counted once; collective over it. Ranks of
    the expert axis hold equally many experts."""
    specs = [slot.spec for name in units for slot in parts.engine.units[name].layout.slots]
    copies = {"dense": 1, "expert": parts.mesh.expert.size}
    held = sum(spec.numel * copies[spec.kind] for spec in specs if not spec.tied_copy)
    return int(all_reduce(torch.tensor(held, device=parts.model.device), parts.mesh.pp))


def sharing_cost(parts: TrainingSetup) -> str | None:
    """What sharded gradients or weights cost this run under a pipeline, in a sentence, by this rank's stages."""
    engine, layout = parts.engine, parts.mesh.layout
    elements = sum(unit.layout.length for unit in engine.units.values())
    trained = sum(unit.layout.length for unit in engine.trained.values())
    volume = step_volume(
        engine.options.policy,
        num_microbatches=first_microbatches(parts.config.train, parts.config.parallel.data_parallel_size),
        weight_bytes=elements * engine.options.param_dtype.itemsize,
        gradient_bytes=trained * engine.options.grad_dtype.itemsize,
    )
    return pipeline_cost(engine.options.policy, volume, num_stages=layout.pp, dp=layout.size("grad"))
