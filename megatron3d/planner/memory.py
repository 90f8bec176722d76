"""The state of training in bytes, by formula: weights, gradients, master weights and moments of every rank.

Everything follows from the flat layout of each unit, which follows from the parameter table of each stage, which a
model built on the meta device gives without any memory. With L the padded length of a unit, K the ranks that share
its state out, e bytes of a weight and g of a gradient, a rank holds of it

    ZeRO stage      weights   gradients             master (where e < 4)   moments (Adam, fp32)
    0               e L       g L  (+ 4 L if g < 4)    4 L                  8 L
    1               e L       g L  (+ 4 L/K if g < 4)  4 L/K                8 L/K
    2               e L       4 L/K (+ g L/K)          4 L/K                8 L/K
    3               e L/K     4 L/K (+ g L/K)          4 L/K                8 L/K

where what stands in brackets is added if gradients are reduced in bf16. Moments leave out the padding between the
spans that the optimizer updates. Of frozen parameters, which have units of their own, there are weights alone.
`test_memory.py` compares all of this with what is allocated.

Source: Rajbhandari et al. 2020 (ZeRO), sections 3.1 and 5, for 16-bit weights and Adam.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from math import prod

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Axis
from megatron3d.comm.meter import Meter
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.optim import OptimConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.update_rules import UPDATE_RULES
from megatron3d.models.stage import Stage, StagePart, unit_of
from megatron3d.models.zoo import architecture_of
from megatron3d.nn.fp8 import fp8_of
from megatron3d.offload.block_file import round_up
from megatron3d.offload.record import FIELD_ALIGNMENT_BYTES
from megatron3d.params.grads import GradSink
from megatron3d.params.module import declared_states, stateful_modules
from megatron3d.params.spec import ParamKind, ParamSpec
from megatron3d.params.state import TOTAL_DTYPE
from megatron3d.pipeline.plan import PipelinePlan
from megatron3d.planner.layout import layout_of
from megatron3d.planner.sizes import BYTES, FP32
from megatron3d.tensor.context import LayerContext
from megatron3d.zero.cut_tables import Blocks, cut_tables, unit_layout
from megatron3d.zero.flat import FlatLayout, Slot, Span, kind_of
from megatron3d.zero.kinds import KINDS
from megatron3d.zero.policy import policy_of

FILE_SLOTS = 3  # staging buffers of offloading to files: one read, one worked on, one written


@dataclass(frozen=True)
class StateForecast:
    """Bytes of one rank's state by kind and place.

    Attributes:
        weights: what the layers read, or this rank's part of it.
        gradients: buffers of gradients that stay from step to step.
        master_weights: fp32 weights beside those of the layers, on the device.
        moments: what the optimizer keeps, on the device, without its scalar counters.
        declared: declared state of modules and beside parameters, on the device.
        host: state that lives in host memory.
        files: state that lives in files.
    """

    weights: int = 0
    gradients: int = 0
    master_weights: int = 0
    moments: int = 0
    declared: int = 0
    host: int = 0
    files: int = 0

    def __add__(self, other: StateForecast) -> StateForecast:
        return StateForecast(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def on_device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.master_weights + self.moments + self.declared


@dataclass(frozen=True)
class RankModel:
    """The stages of one pipeline rank on the meta device, and the layout of each of its units."""

    stages: Mapping[int, Stage]
    units: Mapping[str, FlatLayout]


def parts_of_rank(config: RunConfig, plan: PipelinePlan, pp_rank: int) -> RankModel:
    """Describe what a pipeline rank of a resolved run holds; its tensor-parallel ranks hold equal shares."""
    layout = layout_of(config.parallel, query_groups=config.model.num_query_groups)
    tp, kv, expert, expert_tp = (
        Axis(name, layout.size(name), 0, layout.ranks_along(name, 0), None, Meter())
        for name in ("tp", "kv", "expert", "expert_tp")
    )
    sequence_parallel = config.parallel.sequence_parallel and tp.size > 1
    context = LayerContext(
        tp,
        sequence_parallel,
        GradSink(),
        kv=kv if kv.size > 1 else None,
        expert=expert,
        expert_tp=expert_tp,
        fp8=fp8_of(config.train, weights_stay=not policy_of(config.parallel.zero_stage).shard_params),
    )
    build = architecture_of(config.model).build_stage
    stages = {
        number: build(config.model, config.train, part_of(plan, number), context) for number in plan.stages_of(pp_rank)
    }
    specs: dict[str, list[ParamSpec]] = {}
    for stage in stages.values():
        declared = stage.parameters_by_name()
        for unit, members in stage.units().items():
            # A tied table at both ends of one rank is one table, so the first of its two descriptions is enough.
            specs.setdefault(unit, [declared[member].spec for member in members])
    sharded = policy_of(config.parallel.zero_stage).shard_params
    units = {name: _layout_of(its, layout, shards_weights=sharded) for name, its in specs.items()}
    return RankModel(stages, units)


def _layout_of(specs: Sequence[ParamSpec], layout: Layout, *, shards_weights: bool) -> FlatLayout:
    axes = KINDS[kind_of(specs)]
    tp, num_ranks = layout.size(axes.tensor), layout.size(axes.grad)
    return unit_layout(specs, tp=tp, num_ranks=num_ranks, shards_weights=shards_weights)


def blocks_of(parallel: ParallelConfig, units: Mapping[str, FlatLayout]) -> dict[str, Blocks]:
    """The blocks of each unit of a rank that is a table which stage 3 cuts."""
    if not policy_of(parallel.zero_stage).shard_params:
        return {}
    return cut_tables(units, lambda kind: shard_size(parallel, kind))


def part_of(plan: PipelinePlan, stage: int) -> StagePart:
    """The share of the model that a stage of a plan holds."""
    return StagePart(plan.layers[stage], is_first=stage == 0, is_last=stage == plan.num_stages - 1)


def shard_size(parallel: ParallelConfig, kind: ParamKind = "dense") -> int:
    """Ranks that shard the state of parameters of a kind: 1 where nothing is sharded."""
    policy = policy_of(parallel.zero_stage)
    return layout_of(parallel).size(KINDS[kind].shard) if policy.shard_optimizer else 1


def state_bytes(
    parallel: ParallelConfig, optim: OptimConfig, units: Iterable[FlatLayout], *, shard_rank: int = 0
) -> StateForecast:
    """The state of a rank that holds these units, at position `shard_rank` of the axis that shards it."""
    layouts = list(units)
    owns = [_own_span(parallel, layout, shard_rank) for layout in layouts]
    blocks = blocks_of(parallel, {str(number): layout for number, layout in enumerate(layouts)})
    total = StateForecast()
    parts = [_parts(own, blocks.get(str(number))) for number, own in enumerate(owns)]
    for layout, own, lengths in zip(layouts, owns, parts, strict=True):
        total += _weights_elsewhere(parallel, optim, lengths)
        if not layout.trains:
            total += StateForecast(weights=_weight_bytes(parallel, optim, layout.length, own.length))
            continue
        moments = moment_bytes(optim, layout, own)
        total += _on_device(parallel, optim, layout.length, own.length)
        is_offloaded = parallel.offload_optimizer != "none"
        total += _states_elsewhere(parallel, optim, lengths) if is_offloaded else StateForecast(moments=moments)
    trained = [lengths for layout, lengths in zip(layouts, parts, strict=True) if layout.trains]
    return total + _offload_buffers(parallel, optim, list(chain.from_iterable(trained)))


def _parts(own: Span, blocks: Blocks | None) -> list[int]:
    """Elements of what a rank owns of a unit, by record where they are offloaded: one, or one for each block."""
    if blocks is None:
        return [own.length]
    return [own.length // block.rows_per_rank * block.rows_of_each for block in blocks]


def _own_span(parallel: ParallelConfig, layout: FlatLayout, shard_rank: int) -> Span:
    """What a rank owns of a unit. Experts are sharded over no more ranks than the rest, so positions repeat."""
    ranks = shard_size(parallel, layout.kind)
    return layout.slice_of(shard_rank % ranks, ranks)


def declared_state_bytes(parallel: ParallelConfig, parts: RankModel) -> StateForecast:
    """Declared state of the modules of a pipeline rank, with totals, and beside their parameters."""
    tp = parallel.tensor_model_parallel_size
    states = [one.spec for one in declared_states(parts.stages.values()).values()]
    of_modules = sum(prod(spec.cut.local_shape(tp)) * spec.dtype.itemsize for spec in states)
    for module in stateful_modules(parts.stages.values()).values():
        of_modules += sum(module.get_buffer(name).numel() * TOTAL_DTYPE.itemsize for name in module.total_specs)
    kinds: dict[str, dict[str, int]] = {unit: {} for unit in parts.units}
    for stage in parts.stages.values():
        for one in stage.parameters_by_name().values():
            kinds[unit_of(one.spec)] |= {kind: dtype.itemsize for kind, dtype in one.beside.items()}
    lengths = {unit: _own_span(parallel, layout, 0).length for unit, layout in parts.units.items()}
    beside = sum(lengths[unit] * sum(sizes.values()) for unit, sizes in kinds.items())
    if parallel.offload_optimizer != "none":
        return StateForecast(declared=of_modules, host=beside)
    return StateForecast(declared=of_modules + beside)


def fullest_state(parallel: ParallelConfig, optim: OptimConfig, units: Iterable[FlatLayout]) -> StateForecast:
    """The state of the rank that holds most of those that shard these units."""
    layouts, ranks = list(units), shard_size(parallel)
    best = state_bytes(parallel, optim, layouts)
    if parallel.offload_optimizer != "none":
        return best  # ranks differ in nothing but moments, which leave padding out
    limit = None
    if optim.optimizer not in ("adafactor", "muon"):
        elements = sum(_own_span(parallel, layout, 0).length for layout in layouts if layout.trains)
        limit = elements * _element_bytes(optim, optim.optimizer)
    for rank in range(1, ranks):
        if best.moments == limit:
            break
        best = max(best, state_bytes(parallel, optim, layouts, shard_rank=rank), key=lambda one: one.on_device)
    return best


def least_state_bytes(
    parallel: ParallelConfig, optim: OptimConfig, num_parameters: int, *, some_frozen: bool = False
) -> int:
    """A bound of the state that the fullest rank has on its device, from the parameters of the whole model alone.

    It counts neither padding nor moments of optimizers that keep different ones for matrices; where `some_frozen`
    parameters are it takes all for frozen.
    """
    optimizer = optim.optimizer
    held = num_parameters // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    held //= parallel.expert_model_parallel_size  # as if all parameters were those of experts
    own = held // shard_size(parallel)
    if some_frozen:
        return _weight_bytes(parallel, optim, held, own)
    has_moments = parallel.offload_optimizer == "none" and optimizer not in ("adafactor", "muon")
    moments = own * _element_bytes(optim, optimizer) if has_moments else 0
    return _on_device(parallel, optim, held, own).on_device + moments


def _on_device(parallel: ParallelConfig, optim: OptimConfig, length: int, own: int) -> StateForecast:
    """Weights, gradients and master weights of `length` elements, of which this rank owns `own`."""
    policy = policy_of(parallel.zero_stage)
    element, gradient = BYTES[optim.precision], 2 if parallel.grad_reduce_in_bf16 else FP32
    if policy.shard_grads:
        gradients = own * (FP32 + (gradient if gradient < FP32 else 0))
    else:
        gradients = length * gradient + (own * FP32 if gradient < FP32 else 0)
    is_apart = element < FP32 and parallel.offload_optimizer == "none"
    return StateForecast(
        weights=_weight_bytes(parallel, optim, length, own),
        gradients=gradients,
        master_weights=own * FP32 if is_apart else 0,
    )


def _weight_bytes(parallel: ParallelConfig, optim: OptimConfig, length: int, own: int) -> int:
    """What the layers read of `length` elements, or this rank's part of it, on the device."""
    if parallel.offload_params != "none":
        return 0
    return (own if policy_of(parallel.zero_stage).shard_params else length) * BYTES[optim.precision]


def moment_bytes(optim: OptimConfig, layout: FlatLayout, own: Span) -> int:
    """What the optimizer keeps of one unit on the device: of each span of `own` that is updated alike."""
    spans = [span for _, span in layout.optimizer_spans(own)]
    if optim.optimizer == "adafactor":
        return sum(_factors(slot, slot.span.intersect(own)) for slot in layout.slots)
    if optim.optimizer == "muon":
        matrices = [one.span for one in layout.segments if one.is_hidden_matrix]
        inside = [span for span in spans if any(span.intersect(matrix).length for matrix in matrices)]
        others = sum(span.length for span in spans) - sum(span.length for span in inside)
        return FP32 * sum(span.length for span in inside) + others * _element_bytes(optim, optim.muon_scalar_optimizer)
    return sum(span.length for span in spans) * _element_bytes(optim, optim.optimizer)


def _factors(slot: Slot, held: Span) -> int:
    """Adafactor's state of one parameter: a row and a column of sums for a matrix, whole wherever a part is held."""
    if not held.length:
        return 0
    return FP32 * (sum(slot.spec.shape) if len(slot.spec.shape) == 2 else held.length)


def _element_bytes(optim: OptimConfig, optimizer: str) -> int:
    """Bytes of optimizer state for every element."""
    return sum(_state_sizes(optim, optimizer))


def _state_sizes(optim: OptimConfig, optimizer: str) -> tuple[int, ...]:
    """Bytes of each of an element's states."""
    if optimizer == "sgd" and not optim.sgd_momentum:
        return ()
    sizes = {"exp_avg": BYTES[optim.exp_avg_dtype], "exp_avg_sq": BYTES[optim.exp_avg_sq_dtype]}
    return tuple(sizes.get(state, FP32) for state in UPDATE_RULES[optimizer].states)


def _states_elsewhere(parallel: ParallelConfig, optim: OptimConfig, lengths: Sequence[int]) -> StateForecast:
    """What offloading keeps of one unit that trains: records of master weights and moments."""
    records = [_record(parallel.offload_optimizer, _record_bytes(optim, length)) for length in lengths]
    return sum(records, StateForecast())


def _weights_elsewhere(parallel: ParallelConfig, optim: OptimConfig, lengths: Sequence[int]) -> StateForecast:
    """What offloading keeps of one unit's sharded weights: records of them."""
    records = [_record(parallel.offload_params, length * BYTES[optim.precision]) for length in lengths]
    return sum(records, StateForecast())


def _record(place: str, size: int) -> StateForecast:
    if place == "none":
        return StateForecast()
    return StateForecast(host=size) if place == "cpu" else StateForecast(files=round_up(size))


def _record_bytes(optim: OptimConfig, length: int) -> int:
    """A record: master weights and each moment one after another, each at a multiple of the alignment."""
    position = 0
    for size in (FP32, *_state_sizes(optim, optim.optimizer)):
        position = -(-position // FIELD_ALIGNMENT_BYTES) * FIELD_ALIGNMENT_BYTES + length * size
    return position


def _offload_buffers(parallel: ParallelConfig, optim: OptimConfig, lengths: Sequence[int]) -> StateForecast:
    """Host memory that offloading holds after the first step besides the records; `lengths` are their elements."""
    element = BYTES[optim.precision]
    if parallel.offload_optimizer == "none" or not lengths:
        return StateForecast()
    largest, total = max(lengths), sum(lengths)
    staging = FILE_SLOTS * _record_bytes(optim, largest) if parallel.offload_optimizer == "nvme" else 0
    copies = total * (FP32 + element) if parallel.offload_delayed_update else 0
    landed = FILE_SLOTS * largest * FP32 if parallel.device == "cuda" and not parallel.offload_delayed_update else 0
    return StateForecast(host=staging + copies + landed)
