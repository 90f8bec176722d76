"""Parts: what a run is made of on one rank, put together once and then only used.

Nothing here decides anything: the config says what, the mesh says where, and the builder of the model (such as
`build_gpt_stage`) says which layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron3d_kernels.registry import Registry

from megatron3d.comm.mesh import Mesh
from megatron3d.config.model import ModelConfig
from megatron3d.config.parallel import ParallelConfig
from megatron3d.config.run import RunConfig
from megatron3d.config.train import TrainConfig
from megatron3d.models.stage import Stage, StagePart
from megatron3d.optim.build import build_optimizer
from megatron3d.optim.scaler import LossScaler, build_scaler
from megatron3d.params.grads import GradSink
from megatron3d.pipeline.lower import lower
from megatron3d.pipeline.orders import build_schedule
from megatron3d.pipeline.run import Wire
from megatron3d.pipeline.schedule import Action, Schedule
from megatron3d.pipeline.split import split_layers
from megatron3d.tensor.context import LayerContext
from megatron3d.zero.engine import UnitParameters, ZeroEngine
from megatron3d.zero.policy import policy_of
from megatron3d.zero.unit import UnitOptions

StageBuilder = Callable[[ModelConfig, TrainConfig, StagePart, LayerContext], Stage]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """A schedule and this rank's row of actions."""

    schedule: Schedule
    actions: tuple[Action, ...]


@dataclass
class Rows:
    """This rank's rows by schedule and number of micro-batches, lowered when first asked for."""

    num_ranks: int
    rank: int
    known: dict[tuple[str, int], Row] = field(default_factory=dict)

    def row(self, name: str, num_microbatches: int) -> Row:
        """The row of the named order."""
        key = (name, num_microbatches)
        if key not in self.known:
            schedule = build_schedule(name, num_ranks=self.num_ranks, num_microbatches=num_microbatches)
            self.known[key] = Row(schedule, lower(schedule)[self.rank])
        return self.known[key]


@dataclass(frozen=True)
class Model:
    """This rank's stages, and what is needed to run them."""

    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    stages: dict[int, Stage]
    sink: GradSink
    rows: Rows

    def wire(self, config: RunConfig, *, micro_batch_size: int) -> Wire:
        """What travels between the stages for micro-batches of this size."""
        length = config.model.seq_length
        if config.parallel.sequence_parallel:
            length //= self.mesh.tp.size
        shape = (length, micro_batch_size, config.model.hidden_size)
        return Wire(self.mesh.pp, shape, self.dtype, self.device)


@dataclass(frozen=True)
class Parts:
    """Everything one rank trains with."""

    config: RunConfig
    model: Model
    engine: ZeroEngine
    optimizer: torch.optim.Optimizer
    scaler: LossScaler

    @property
    def mesh(self) -> Mesh:
        """The live layout."""
        return self.model.mesh


def stage_parts(model: ModelConfig, parallel: ParallelConfig) -> tuple[StagePart, ...]:
    """The share of the model that each pipeline stage holds.

    Raises:
        ConfigError: the layers cannot be split as asked.
    """
    split = split_layers(
        model.num_layers,
        parallel.pipeline_model_parallel_size,
        first=parallel.decoder_first_pipeline_num_layers,
        last=parallel.decoder_last_pipeline_num_layers,
        count_embedding=parallel.account_for_embedding_in_pipeline_split,
        count_loss=parallel.account_for_loss_in_pipeline_split,
    )
    last = len(split) - 1
    return tuple(StagePart(layers, i == 0, i == last) for i, layers in enumerate(split))


def build_model(config: RunConfig, mesh: Mesh, device: torch.device, builder: StageBuilder) -> Model:
    """Build this rank's stage on the meta device; its parameters have no memory yet."""
    sink = GradSink()
    sequence_parallel = config.parallel.sequence_parallel and mesh.tp.size > 1
    context = LayerContext(mesh.tp, sequence_parallel, sink, Registry())
    number = mesh.pp.rank
    part = stage_parts(config.model, config.parallel)[number]
    stages = {number: builder(config.model, config.train, part, context)}
    return Model(mesh, device, DTYPES[config.optim.precision], stages, sink, Rows(mesh.pp.size, mesh.pp.rank))


def build_parts(config: RunConfig, mesh: Mesh, device: torch.device, builder: StageBuilder) -> Parts:
    """Build model, flat units, optimizer and loss scaler of this rank, with the initial weights in place."""
    model = build_model(config, mesh, device, builder)
    reduces_in_bf16 = config.parallel.grad_reduce_in_bf16
    options = UnitOptions(
        policy=policy_of(config.parallel.zero_stage),
        param_dtype=model.dtype,
        grad_dtype=torch.bfloat16 if reduces_in_bf16 else torch.float32,
        device=device,
        seed=config.data.seed,
        overlap=config.parallel.overlap_grad_reduce,
    )
    engine = ZeroEngine(unit_parameters(model.stages), mesh, options, model.sink)
    optimizer = build_optimizer(config.optim, [(piece.parameter, piece.decays) for piece in engine.pieces])
    return Parts(config, model, engine, optimizer, build_scaler(config.optim))


def unit_parameters(stages: dict[int, Stage]) -> dict[str, UnitParameters]:
    """The units of a rank's stages in the order of the model.

    A tied table that the rank's first and last stages share is one unit, which both use.
    """
    units: dict[str, UnitParameters] = {}
    holds_both_ends = any(s.part.is_first for s in stages.values()) and any(s.part.is_last for s in stages.values())
    for number, stage in stages.items():
        declared = stage.parameters_by_name()
        for name, members in stage.units().items():
            before = units.get(name)
            contributions = sum(stage.uses_of(member) for member in members) + (before.contributions if before else 0)
            users = (*(before.stages if before else ()), number)
            is_tied = name == stage.tied_unit and not holds_both_ends
            units[name] = UnitParameters(users, tuple(declared[m] for m in members), contributions, is_tied)
    return units
