"""The memory ledger: what every rank of a run holds, by formula, before anything is allocated.

`ledger_of` has the exact bytes of the state and an estimate of the peak of a training step: activations,
gradients on their way, whole units under ZeRO, messages, temporaries. docs/memory.md has how near it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron3d.config.run import RunConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.stage import StagePart, whole_stage
from megatron3d.models.zoo import architecture_of
from megatron3d.params.freeze import require_sensible
from megatron3d.pipeline.lower import lower
from megatron3d.pipeline.plan import PipelinePlan
from megatron3d.pipeline.schedule import Action, Schedule
from megatron3d.planner.fp8 import cast_weight_bytes
from megatron3d.planner.memory import (
    RankModel,
    StateForecast,
    blocks_of,
    declared_state_bytes,
    fullest_state,
    part_of,
    parts_of_rank,
    shard_size,
)
from megatron3d.planner.replay import MemoryUse, left_of
from megatron3d.planner.save_copy import save_copy_bytes
from megatron3d.planner.sizes import BYTES, FP32
from megatron3d.planner.stage_records import StageRecords
from megatron3d.planner.stage_run import message_bytes
from megatron3d.planner.stored_inputs import most_stored_inputs
from megatron3d.planner.temporaries import publish_temporary, update_temporary
from megatron3d.planner.timeline import RankStages, peak_use
from megatron3d.planner.transient import TransientPlan, TransientUnit
from megatron3d.zero.cut_tables import BLOCKS_AT_ONCE, block_name
from megatron3d.zero.policy import policy_of


@dataclass(frozen=True)
class Ledger:
    """One pipeline rank: of the ranks that hold shards of its stages, the one that holds most.

    Attributes:
        pp_rank: position along the pipeline.
        state: exact, from step to step; on the host or in files with the activations that are offloaded there.
        activations: kept for backwards at the peak of a step.
        buffers: everything else that is there then and not state.
        save_copy: what asynchronous saves hold on the host, about.
    """

    pp_rank: int
    state: StateForecast
    activations: int
    buffers: int
    save_copy: int = 0

    @property
    def host(self) -> int:
        """Bytes of host memory beside what a device on the host takes."""
        return self.state.host + self.save_copy

    @property
    def peak(self) -> int:
        """Bytes on the device at the peak of a step."""
        return self.state.on_device + self.activations + self.buffers

    def rows(self) -> dict[str, int]:
        """Bytes by name, as the metrics file and tools/estimate.py have them."""
        state = self.state
        return {
            "weights": state.weights,
            "gradients": state.gradients,
            "optimizer": state.master_weights + state.moments + state.declared,
            "activations": self.activations,
            "buffers": self.buffers,
            "peak": self.peak,
            "host": self.host,
            "files": state.files,
            "save_copy": self.save_copy,
        }


def ledger_of(records: StageRecords, plan: PipelinePlan) -> tuple[Ledger, ...]:
    """The ledger of every pipeline rank of a resolved run with its vocabulary settled.

    Args:
        records: what the stages of the run allocate, on its device; plans of one run can share them, which is most of
            the time that a ledger takes.
        plan: how the run is cut along its depth.

    Raises:
        ConfigError: --freeze-params names nothing or everything.
    """
    config = records.config
    if config.train.freeze_params:
        full_model = whole_stage(config.model, config.train, architecture_of(config.model).build_stage)
        require_sensible(config.train.freeze_params, full_model.parameters_by_name())
    schedule = plan.training(first_microbatches(config.train, config.parallel.data_parallel_size))
    rows = lower(schedule)
    return tuple(
        ledger_of_rank(plan, (schedule, rows[rank]), parts_of_rank(config, plan, rank), rank, records)
        for rank in range(plan.num_ranks)
    )


def ledger_of_rank(
    plan: PipelinePlan,
    row: tuple[Schedule, Sequence[Action]],
    parts: RankModel,
    pp_rank: int,
    records: StageRecords,
) -> Ledger:
    """The ledger of one pipeline rank.

    Args:
        plan: how the run is cut along its depth.
        row: the schedule of a step, and this rank's actions of it.
        parts: what the rank holds.
        pp_rank: its position along the pipeline.
        records: what the stages of the run allocate, on its device.
    """
    config, device_type = records.config, records.device_type
    parallel, optim, units = config.parallel, config.optim, parts.units.values()
    state = fullest_state(parallel, optim, units) + declared_state_bytes(parallel, parts)
    away = most_stored_inputs(config.train, plan, row[1]) if parallel.offload_activations else 0
    stored = away * message_bytes(config)
    state += StateForecast(files=stored) if device_type == "cpu" else StateForecast(host=stored)
    blocks = blocks_of(parallel, parts.units)
    stages = RankStages(
        lambda number, splits: records.of(part_of(plan, number), splits=splits, blocks=blocks),
        sharing_of(parallel, parts, optim.precision, device_type=device_type),
        message_bytes(config),
        sends_linger=device_type == "cpu",
    )
    cast = cast_weight_bytes(parts.stages.values(), device_type=device_type)
    in_step = replace(used := peak_use(stages, *row), work=used.work + cast)
    after = max(one(parallel, optim, units, device_type=device_type) for one in (publish_temporary, update_temporary))
    peak = max(in_step, MemoryUse(work=after), key=lambda one: one.total)
    copy = save_copy_bytes(parallel, optim, config.checkpoint, parts)
    return Ledger(pp_rank, state, peak.activations, peak.total - peak.activations, save_copy=copy)


def sharing_of(
    parallel: ParallelConfig, parts: RankModel, precision: str, *, device_type: str
) -> Mapping[int, TransientPlan]:
    """What each stage of a rank gathers for a while."""
    policy = policy_of(parallel.zero_stage)
    gradient, element = 2 if parallel.grad_reduce_in_bf16 else FP32, BYTES[precision]
    copies = device_type == "cpu" and shard_size(parallel) > 1
    is_fetched = parallel.offload_params != "none"
    blocks = blocks_of(parallel, parts.units)
    units = {
        name: TransientUnit(
            gradients=layout.length * gradient if policy.shard_grads and layout.trains else 0,
            weights=layout.length * element if policy.shard_params else 0,
            scatter=layout.length * gradient if copies and layout.trains else 0,
            gather=layout.length * element if copies else 0,
            is_fetched=is_fetched,
        )
        for name, layout in parts.units.items()
        if name not in blocks
    }
    for name, found in blocks.items():
        sizes = [parts.units[name].length * block.rows_of_each // block.rows_per_rank for block in found]
        largest = max(sizes) * element
        gather = largest if copies else 0
        units[name] = TransientUnit(weights=BLOCKS_AT_ONCE * largest, gather=gather, is_fetched=is_fetched)
        for number, size in enumerate(sizes if parts.units[name].trains else []):
            units[block_name(name, number)] = TransientUnit(
                gradients=size * gradient, scatter=size * gradient if copies else 0, is_block=True
            )
    users = [name for stage in parts.stages.values() for name in stage.units()]
    twice = frozenset(name for name in users if users.count(name) > 1)
    return {
        number: TransientPlan(
            units=units,
            places=stage.places(),
            shard_gradients=policy.shard_grads,
            shard_weights=policy.shard_params,
            overlaps=parallel.overlap_grad_reduce,
            prefetch=parallel.zero_prefetch_units,
            used_elsewhere=twice,
        )
        for number, stage in parts.stages.items()
    }


def activation_bytes(config: RunConfig, part: StagePart, *, device_type: str) -> int:
    """What one micro-batch keeps in one stage between its forward and its backward, with the stage's input."""
    kept = left_of(StageRecords(config, device_type).of(part).forward).total
    return kept + (0 if part.is_first else message_bytes(config))


def first_microbatches(train: TrainConfig, data_parallel_size: int) -> int:
    """Micro-batches of a step at the full global batch, or the largest one of a growing batch."""
    return max(1, train.global_batch_size // (train.micro_batch_size * data_parallel_size))


def worst(ledgers: Sequence[Ledger]) -> Ledger:
    """The rank that needs most memory on its device."""
    return max(ledgers, key=lambda one: one.peak)
