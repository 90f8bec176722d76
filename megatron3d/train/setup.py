"""Parts: what a run is made of on one rank, put together once and then only used.

Nothing here decides anything: the config says what, the mesh says where, and the builder of the model (such as
`build_gpt_stage`) says which layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from megatron3d_kernels.launch import TRITON, TritonSupport
from megatron3d_kernels.products import ONEDNN, TORCH
from megatron3d_kernels.registry import Registry
from megatron3d_kernels.selection import DEFAULT_SELECTION

from megatron3d.comm.device import require_fp8
from megatron3d.comm.mesh import Axis, Mesh
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.errors import ConfigError
from megatron3d.models.stage import MicroBatch, Stage, StageBuilder, whole_stage
from megatron3d.nn.fp8 import fp8_of
from megatron3d.nn.loss_sink import LossSpec, loss_problems
from megatron3d.optim.build import build_optimizer, write_copies
from megatron3d.optim.scaler import LossScaler, build_scaler
from megatron3d.params.boxes import ShardView
from megatron3d.params.freeze import require_sensible
from megatron3d.params.gate import WeightGate
from megatron3d.params.grads import GradSink
from megatron3d.pipeline.lower import lower
from megatron3d.pipeline.plan import PipelinePlan
from megatron3d.pipeline.run import Wire
from megatron3d.pipeline.schedule import Action, Schedule
from megatron3d.planner.memory import part_of
from megatron3d.tensor.context import EagerCall, KeyExchange, LayerContext, call
from megatron3d.tensor.fp8_recipe import Fp8Recipe
from megatron3d.tensor.kept_inputs import InputStore
from megatron3d.train.attention import AttentionUse, attention_choice
from megatron3d.train.compiling import CompiledBlocks, compile_blocks, eager_call, require_compiler
from megatron3d.train.module_states import ModuleStates
from megatron3d.train.offload import kept_inputs_of, offload_of
from megatron3d.train.plan import plan_of
from megatron3d.train.random_ltd import RandomLtd, random_ltd_of
from megatron3d.zero.engine import UnitParameters, ZeroEngine
from megatron3d.zero.policy import policy_of
from megatron3d.zero.unit import UnitOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoweredSchedule:
    """A schedule and this rank's row of actions."""

    schedule: Schedule
    actions: tuple[Action, ...]


@dataclass
class LoweredSchedules:
    """This rank's rows by number of micro-batches, lowered when first asked for."""

    plan: PipelinePlan
    rank: int
    known: dict[tuple[bool, int], LoweredSchedule] = field(default_factory=dict)

    def training(self, num_microbatches: int) -> LoweredSchedule:
        """The row of a training step."""
        return self._row(True, num_microbatches)

    def forward_only(self, num_microbatches: int) -> LoweredSchedule:
        """The row of an evaluation or of generation."""
        return self._row(False, num_microbatches)

    def _row(self, trains: bool, num_microbatches: int) -> LoweredSchedule:
        key = (trains, num_microbatches)
        if key not in self.known:
            schedule = self.plan.training(num_microbatches) if trains else self.plan.forward_only(num_microbatches)
            self.known[key] = LoweredSchedule(schedule, lower(schedule)[self.rank])
        return self.known[key]


@dataclass(frozen=True)
class Model:
    """This rank's stages, and what is needed to run them."""

    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    stages: dict[int, Stage]
    sink: GradSink
    gate: WeightGate
    rows: LoweredSchedules
    fp8: Fp8Recipe | None = None

    def unchanged_weights(self) -> AbstractContextManager[None]:
        """Within the context weights do not change, but may come and go where they are sharded."""
        return nullcontext() if self.fp8 is None else self.fp8.weights.unchanged()

    @property
    def losses(self) -> tuple[LossSpec, ...]:
        """The losses that the model declares, the same on every rank."""
        return next(iter(self.stages.values())).losses

    @property
    def holds_last_stage(self) -> bool:
        """Whether this rank gives losses or logits."""
        return any(stage.part.is_last for stage in self.stages.values())

    def wire(self, model: ModelConfig, parallel: ParallelConfig, micros: Sequence[MicroBatch]) -> Wire:
        """What travels between the stages for these micro-batches, which may have different lengths."""
        cut = self.mesh.tp.size if parallel.sequence_parallel else 1
        sizes = [micro.tokens_BS.shape for micro in micros]
        shapes = [(length // cut, samples, model.hidden_size) for samples, length in sizes]
        return Wire(self.mesh.pp, shapes, self.dtype, self.device)


@dataclass(frozen=True)
class TrainingSetup:
    """Everything one rank trains with; `writes_copies` says that the optimizer writes the engine's `layer_copies`."""

    config: RunConfig
    model: Model
    engine: ZeroEngine
    optimizer: torch.optim.Optimizer
    scaler: LossScaler
    states: ModuleStates
    random_ltd: RandomLtd | None = None
    writes_copies: bool = False
    compiled: CompiledBlocks | None = None

    @property
    def mesh(self) -> Mesh:
        """The live layout."""
        return self.model.mesh

    def model_views(self, *, with_copies: bool = True) -> dict[str, ShardView]:
        """What checkpoints store of the model, by full name: weights, and declared state of its modules; see
        `ZeroEngine.weight_views`."""
        return self.engine.weight_views(with_copies=with_copies) | self.states.views()


def build_model(
    config: RunConfig,
    mesh: Mesh,
    device: torch.device,
    builder: StageBuilder,
    *,
    kept_inputs: InputStore | None = None,
    eager: EagerCall = call,
) -> Model:
    """Build this rank's stages on the meta device; their parameters have no memory yet. `kept_inputs` takes the inputs
    of recomputed layers off the device; `eager` calls what blocks that are compiled leave as it is.

    Raises:
        ConfigError: the layers cannot be split as asked, the losses of the model contradict one another, or the device
            does not have what --fp8-format, --attention-backend, --packed-attention or --kernels asks for.
        ScheduleError: the order of work is not known or does not take the stages it is given.
    """
    AttentionUse(config.model, config.train, DTYPES[config.optim.precision], device).settle()
    sink, gate = GradSink(), WeightGate()
    sequence_parallel = config.parallel.sequence_parallel and mesh.tp.size > 1
    fp8 = fp8_of(config.train, weights_stay=not policy_of(config.parallel.zero_stage).shard_params)
    if fp8 is not None:
        require_fp8(device, by_blocks=fp8.scaling == "blockwise")
    context = LayerContext(
        mesh.tp,
        sequence_parallel,
        sink,
        kernels_of(config.train, device),
        gate,
        kv=mesh.kv if mesh.kv.size > 1 else None,
        expert=mesh.expert,
        expert_tp=mesh.expert_tp,
        kept_inputs=kept_inputs,
        cp=mesh.cp,
        exchange=key_exchange(config.parallel, heads=mesh.cp_heads, ring=mesh.cp_ring),
        overlap_chunks=config.parallel.overlap_chunks,
        fp8=fp8,
        eager=eager,
    )
    plan = plan_of(config)
    stages = {
        stage: builder(config.model, config.train, part_of(plan, stage), context)
        for stage in plan.stages_of(mesh.pp.rank)
    }
    _share_tied_table(list(stages.values()))
    if problems := loss_problems(next(iter(stages.values())).losses):
        raise ConfigError(f"the losses of {config.model.traits.title} cannot be used: {'; '.join(problems)}")
    rows = LoweredSchedules(plan, mesh.pp.rank)
    return Model(mesh, device, DTYPES[config.optim.precision], stages, sink, gate, rows, fp8)


def kernels_of(train: TrainConfig, device: torch.device) -> Registry:
    """The kernels that the options choose for this device.

    Raises:
        ConfigError: --packed-attention or --kernels names kernels that the device does not run.
    """
    library, packed = ONEDNN if train.matmul == "onednn" else TORCH, train.packed_attention
    if packed != TORCH and device.type != "cuda":
        raise ConfigError(f"--packed-attention {packed} is for CUDA devices, and the device is {device}; drop it.")
    forced, attention = forced_kernels(train.kernels, device), attention_choice(train, device)
    return Registry(forced, library=library, packed=packed, attention=attention)


def forced_kernels(kernels: str, device: torch.device, *, support: TritonSupport = TRITON) -> str | None:
    """The implementation that `--kernels` forces; None is by device.

    Raises: ConfigError where it cannot run.
    """
    if kernels == "triton" and not (support.installed and (device.type == "cuda" or support.interpreted)):
        why = f"the device is {device}" if support.installed else support.detail
        raise ConfigError(
            f"--kernels triton needs Triton and a GPU, or Triton's interpreter (TRITON_INTERPRET=1), and {why}; leave "
            "--kernels out."
        )
    return None if kernels == "auto" else kernels


def key_exchange(parallel: ParallelConfig, *, heads: Axis, ring: Axis) -> KeyExchange:
    """How the options let context-parallel ranks attend to each other's keys; the axes are those of a2a+p2p."""
    return KeyExchange(tuple(parallel.cp_comm_type) or ("allgather",), parallel.cp_gather_again, heads, ring)


def _share_tied_table(stages: list[Stage]) -> None:
    """Let a last stage project with the table of a first stage on the same rank, instead of with a copy."""
    first, last = stages[0], stages[-1]
    if first is not last and first.part.is_first and last.part.is_last and last.tied_unit is not None:
        assert first.embedding is not None and last.embedding is not None, "a tied model has its table at both ends"
        last.embedding.word = first.embedding.word


def build_parts(config: RunConfig, mesh: Mesh, device: torch.device, builder: StageBuilder) -> TrainingSetup:
    """Build model, flat units, optimizer and loss scaler of this rank, with the initial weights in place.

    Raises:
        ConfigError: the layers cannot be split as asked, --freeze-params names nothing or everything,
            --random-ltd-router cannot be loaded, --offload-activations lacks a directory, or --compile a compiler.
        StorageError: files cannot be made under --offload-dir.
        ScheduleError: the order of work is not known or does not take the stages it is given.
    """
    if config.train.freeze_params:
        full_model = whole_stage(config.model, config.train, builder)
        require_sensible(config.train.freeze_params, full_model.parameters_by_name())
    compiles = config.train.compile
    if compiles:
        require_compiler(device)
    kept_inputs = kept_inputs_of(config.parallel, rank=mesh.rank, device=device)
    eager = eager_call(compiles=compiles)
    model = build_model(config, mesh, device, builder, kept_inputs=kept_inputs, eager=eager)
    reduces_in_bf16 = config.parallel.grad_reduce_in_bf16
    options = UnitOptions(
        policy=policy_of(config.parallel.zero_stage),
        param_dtype=model.dtype,
        grad_dtype=torch.bfloat16 if reduces_in_bf16 else torch.float32,
        device=device,
        seed=config.data.seed,
        overlap=config.parallel.overlap_grad_reduce,
        overlap_gather=config.parallel.overlap_param_gather,
        prefetch=config.parallel.zero_prefetch_units,
        offload=offload_of(config.parallel, config.optim, rank=mesh.rank, device=device),
    )
    places = {number: stage.places() for number, stage in model.stages.items()}
    engine = ZeroEngine(unit_parameters(model.stages), mesh, options, model.sink, gate=model.gate, places=places)
    is_on_device = options.offload.states is None
    optimizer = build_optimizer(
        config.optim,
        [(flat.parameter, flat.decays) for flat in engine.flat_parameters],
        engine.full_parameters,
        # Offloaded states are updated on the CPU, whatever the device of the layers.
        kernels=kernels_of(config.train, device) if is_on_device else DEFAULT_SELECTION,
    )
    writes_copies = is_on_device and write_copies(optimizer, engine.layer_copies())
    states = ModuleStates(model.stages.values(), mesh, device, seed=config.data.seed)
    random_ltd = random_ltd_of(config.train, config.model, config.parallel, seed=config.data.seed)
    scaler = build_scaler(config.optim)
    compiled = compile_blocks(model.stages.values()) if compiles else None
    return TrainingSetup(
        config, model, engine, optimizer, scaler, states, random_ltd, writes_copies=writes_copies, compiled=compiled
    )


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
