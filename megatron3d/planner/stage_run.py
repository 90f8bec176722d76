"""One forward and backward of a stage without memory: the model itself runs, on the meta device, and is recorded.

The stage is built as a run builds it, for a rank of the tensor axis whose others are not there (`ShapeOnlyGroup`), with
the kernels of the device that is asked for. Its weights pass the gate and its gradients reach the sink as in a run, so
the record also says when which weights are read and when which gradients arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import prod

import torch
from megatron3d_kernels.attention_backends import AttentionChoice
from megatron3d_kernels.products import ONEDNN, TORCH
from torch import Tensor, nn

from megatron3d.comm.mesh import Axis
from megatron3d.comm.meter import Meter
from megatron3d.comm.shape_only import ShapeOnlyGroup
from megatron3d.config.curriculum import total_steps
from megatron3d.config.random_ltd import dropping_layers, positions_kept
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.models.stage import MicroBatch, Stage, StagePart
from megatron3d.models.zoo import architecture_of
from megatron3d.nn.context.cut import ContextCut
from megatron3d.nn.context.shards import ContextShards, shards_of
from megatron3d.nn.documents import document_rectangles
from megatron3d.nn.dropout import DropoutStream
from megatron3d.nn.fp8 import fp8_of
from megatron3d.nn.loss_sink import LossSink, LossSpec
from megatron3d.nn.token_dropping import StratifiedRouter, TokenDropping
from megatron3d.params.gate import WeightGate
from megatron3d.params.grads import GradSink
from megatron3d.params.row_blocks import BlockedTable
from megatron3d.planner.fp8 import weights_cast
from megatron3d.planner.kernel_scratch import cpu_scratch, no_scratch
from megatron3d.planner.kernels_without_memory import CpuKernels, GpuKernels
from megatron3d.planner.layout import layout_of
from megatron3d.planner.recording import Event, Kind, StorageRecorder
from megatron3d.planner.result_shapes import result_of
from megatron3d.planner.sizes import BYTES, DTYPES
from megatron3d.planner.stored_inputs import InputsWithoutMemory
from megatron3d.planner.table_run import RecordedTable
from megatron3d.tensor.context import KeyExchange, LayerContext
from megatron3d.zero.cut_tables import Blocks
from megatron3d.zero.policy import policy_of


@dataclass(frozen=True)
class StageRecord:
    """One forward, its backward (where it is split, the input gradients alone), and the deferred weight gradients."""

    forward: tuple[Event, ...]
    backward: tuple[Event, ...]
    weights: tuple[Event, ...] = ()


class _RecordingGatherer:
    """Notes where a forward and a backward come to; the weights are always here."""

    releases = True

    def __init__(self, recorder: StorageRecorder) -> None:
        self._recorder = recorder
        self.tables: dict[nn.Parameter, BlockedTable] = {}

    def gather_weights(self, place: str, *, backward: bool) -> None:
        self._recorder.mark(Kind.ENTER_BACKWARD if backward else Kind.ENTER, place)

    def release_weights(self, place: str, *, backward: bool) -> None:
        self._recorder.mark(Kind.LEAVE_BACKWARD if backward else Kind.LEAVE, place)

    def blocks_of(self, table: nn.Parameter) -> BlockedTable | None:
        return self.tables.get(table)


@dataclass
class StageRun:
    """How stages of a resolved run are recorded.

    Attributes:
        config: the run.
        device_type: "cpu" or "cuda", whose kernels allocate different things.
        without_memory: the device of the tensors; a test takes fake tensors of a CPU instead.
        blocks: of the units that are tables which come in blocks.
    """

    config: RunConfig
    device_type: str
    without_memory: torch.device = field(default=torch.device("meta"))
    blocks: Mapping[str, Blocks] = field(default_factory=dict)

    @property
    def _on_cpu(self) -> bool:
        return self.device_type == "cpu"

    def record(self, part: StagePart, *, splits: bool) -> StageRecord:
        """Build a stage and run it; `splits` defers weight gradients, as schedules with split backwards do."""
        sink, gate = GradSink(), WeightGate()
        stage = self._stage(part, sink, gate)
        results = (result_of,) if self.without_memory.type == "meta" else ()
        recorder = StorageRecorder(cpu_scratch if self._on_cpu else no_scratch, *results)
        gatherer = _RecordingGatherer(recorder)
        gate.bind(gatherer)
        device = self.without_memory
        gatherer.tables = self._materialize(stage, sink, recorder, device)
        micro = self._micro_batch(device, stage.losses)
        x = None if part.is_first else torch.empty(message_shape(self.config), dtype=self._dtype, device=device)
        recorder.ignore(one for one in (*vars(micro).values(), x) if isinstance(one, Tensor))
        with weights_cast(stage, recorder):
            return _pass(recorder, sink, stage, micro, x, splits=splits)

    @property
    def _tp_rank(self) -> int:
        """The second, since the first differs from the others: it has the first position of a sharded sequence."""
        return min(1, self.config.parallel.tensor_model_parallel_size - 1)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.config.optim.precision]

    def _stage(self, part: StagePart, sink: GradSink, gate: WeightGate) -> Stage:
        config = self.config
        layout = layout_of(config.parallel, query_groups=config.model.num_query_groups)
        rank = layout.ranks_along("tp", 0)[self._tp_rank]
        tp, kv, expert, expert_tp, cp, heads, ring = (
            self._axis(name, layout.ranks_along(name, rank), rank)
            for name in ("tp", "kv", "expert", "expert_tp", "cp", "cp_heads", "cp_ring")
        )
        sequence_parallel = config.parallel.sequence_parallel and tp.size > 1
        library = ONEDNN if config.train.matmul == "onednn" else TORCH
        attention = AttentionChoice(config.train.attention_backend)
        kernels = CpuKernels(library=library, attention=attention) if self._on_cpu else GpuKernels(attention=attention)
        store = InputsWithoutMemory(on_cpu=self._on_cpu) if config.parallel.offload_activations else None
        kinds = config.parallel.cp_comm_type or ("allgather",)
        exchange = KeyExchange(kinds, config.parallel.cp_gather_again, heads, ring)
        context = LayerContext(
            tp,
            sequence_parallel,
            sink,
            kernels,
            gate,
            kv if kv.size > 1 else None,
            expert,
            expert_tp,
            cp=cp,
            exchange=exchange,
            kept_inputs=store,
            overlap_chunks=config.parallel.overlap_chunks,
            fp8=fp8_of(config.train, weights_stay=not policy_of(config.parallel.zero_stage).shard_params),
        )
        model = config.model
        if not self._on_cpu:  # fused kernels draw what they drop, and keep no mask of it
            model = replace(model, attention_dropout=0.0)
        return architecture_of(model).build_stage(model, config.train, part, context)

    def _axis(self, name: str, ranks: tuple[int, ...], rank: int) -> Axis:
        """An axis of ranks of which this one alone is there."""
        position, size = ranks.index(rank), len(ranks)
        group = ShapeOnlyGroup(position, size, copies=self._on_cpu) if size > 1 else None
        return Axis(name, size, position, ranks, group, Meter(), pairwise=self._on_cpu)

    def _materialize(
        self, stage: Stage, sink: GradSink, recorder: StorageRecorder, device: torch.device
    ) -> dict[nn.Parameter, BlockedTable]:
        """Give parameters storages, and bind them to buffers as the units of the run's ZeRO stage do; returns those
        that come in blocks."""
        parallel = self.config.parallel
        late = policy_of(parallel.zero_stage).shard_grads
        of_gradients = torch.bfloat16 if parallel.grad_reduce_in_bf16 else torch.float32
        units = {member: unit for unit, members in stage.units().items() for member in members}
        tables: dict[nn.Parameter, BlockedTable] = {}
        for name, declared in stage.parameters_by_name().items():
            shape = declared.parameter.shape
            parameter = nn.Parameter(
                torch.empty(shape, dtype=self._dtype, device=device), requires_grad=declared.spec.trains
            )
            declared.owner.register_parameter(declared.attribute, parameter)
            recorder.ignore([parameter])
            if units[name] in self.blocks:
                table = RecordedTable(
                    recorder, units[name], self.blocks[units[name]], parameter, of_gradients, copies=self._on_cpu
                )
                tables[parameter] = table
                if declared.spec.trains:
                    sink.bind_blocks(parameter, table, lambda: None)
                continue
            if not declared.spec.trains:
                continue
            buffer = torch.empty(shape, dtype=of_gradients, device=device)
            buffer_of, on_arrival = _arrivals(recorder, units[name], buffer)
            if late:
                sink.bind_late(parameter, buffer_of, on_arrival)
            else:
                sink.bind(parameter, buffer, on_arrival)
            recorder.ignore([buffer])
        return tables

    def _micro_batch(self, device: torch.device, losses: Sequence[LossSpec]) -> MicroBatch:
        """Samples of the run's shapes, with every field that its model or its options ask for."""
        model, data = self.config.model, self.config.data
        samples, length = self.config.train.micro_batch_size, _local_length(model, self.config.parallel)
        shards = self._shards(device)
        masks_sentences = model.traits.samples == "sentences"

        def numbers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64, device=device)

        gradients = {spec.name: 1.0 for spec in losses}
        drops = max(model.hidden_dropout, model.attention_dropout) > 0
        return MicroBatch(
            tokens_BS=numbers(samples, length),
            labels_BS=numbers(samples, length),
            loss_mask_BS=torch.empty(samples, length, device=device),
            label_index_P=numbers(num_predicted(samples * length, data.mask_prob)) if masks_sentences else None,
            position_ids_BS=(
                numbers(samples, length) if data.reset_position_ids else None if shards is None else shards.positions_BL
            ),
            attention_mask_BST=(
                torch.empty(samples, 1, length, dtype=torch.bool, device=device) if masks_sentences else None
            ),
            # One document a sample, which needs more memory than several.
            rectangles=document_rectangles(torch.zeros(1, length, dtype=torch.int64))
            if data.reset_attention_mask
            else None,
            token_types_BS=numbers(samples, length) if model.num_token_types else None,
            sentence_labels_B=numbers(samples) if model.has_binary_head else None,
            losses=LossSink(losses, tp_rank=self._tp_rank, device=device, gradients=gradients),
            dropout=DropoutStream(seed=0, first_sample=0) if drops else None,
            dropping=self._token_dropping(),
            shards=shards,
        )

    def _shards(self, device: torch.device) -> ContextShards | None:
        """Those of samples that are one document each."""
        parallel, model = self.config.parallel, self.config.model
        if parallel.context_parallel_size == 1:
            return None
        cut = ContextCut(parallel.context_cut, model.seq_length, parallel.context_parallel_size)
        return shards_of(cut, rank=0, is_causal=model.is_causal).sent_to(device)

    def _token_dropping(self) -> TokenDropping | None:
        """Random-LTD with as many positions as the run keeps at its end, when they are most; None where all are kept,
        and with a user's own choice, which is not asked."""
        train, model = self.config.train, self.config.model
        if not train.random_ltd or train.random_ltd_router is not None:
            return None
        steps = total_steps(train, self.config.parallel.data_parallel_size) or 1
        most = positions_kept(train, steps - 1, model.seq_length)
        layers = frozenset(dropping_layers(train.random_ltd_layers, model.num_layers))
        return TokenDropping(_ShapesOfKept(StratifiedRouter(0, most)), layers, first_sample=0)


@dataclass(frozen=True)
class _ShapesOfKept:
    """As many positions as a router chooses, but none in particular."""

    router: StratifiedRouter

    def num_kept(self, layer: int, length: int) -> int:
        return self.router.num_kept(layer, length)

    def kept(self, layer: int, samples: range, length: int, device: torch.device) -> Tensor | None:
        number = self.num_kept(layer, length)
        if number == length:
            return None
        if device.type == "cpu":  # the host's own, whose values are looked at
            return (torch.arange(number) * length // number).expand(len(samples), -1)
        return torch.empty(len(samples), number, dtype=torch.int64, device=device)


def _arrivals(recorder: StorageRecorder, unit: str, buffer: Tensor) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """The getter of a parameter's buffer, and the callback for when a gradient has been added to it."""

    def buffer_of() -> Tensor:
        recorder.mark(Kind.ARRIVE, unit)
        return buffer

    return buffer_of, lambda: recorder.mark(Kind.CONTRIBUTE, unit)


def _pass(
    recorder: StorageRecorder, sink: GradSink, stage: Stage, micro: MicroBatch, x: Tensor | None, *, splits: bool
) -> StageRecord:
    """As `pipeline/run.py` does it: output and gradient of the output are held until the backward is over."""
    if x is not None:
        x.requires_grad_()
    with recorder:
        y = stage(x, micro)
    forward = recorder.take()
    gradient = None if stage.part.is_last else torch.empty_like(y)
    recorder.ignore([] if gradient is None else [gradient])
    with sink.defer() if splits else nullcontext([]) as works, recorder, recorder.backward():
        if y.requires_grad:
            torch.autograd.backward(y, gradient)
    del y
    if x is not None:
        x.grad = None  # a message from now on
    return StageRecord(forward, recorder.take(), tuple(_weight_gradients(recorder, works)))


def _weight_gradients(recorder: StorageRecorder, works: Sequence[Callable[[], None]]) -> Iterator[Event]:
    """Do the deferred work, and note whose it is where that changes."""
    unit = ""
    for work in works:
        with recorder, recorder.backward():
            work()
        events = recorder.take()
        names = [event.name for event in events if event.kind is Kind.CONTRIBUTE]
        if names and names[0] != unit:
            unit = names[0]
            yield Event(Kind.DEFERRED, name=unit)
        yield from events


def num_predicted(num_tokens: int, mask_prob: float) -> int:
    """Masked tokens of a micro-batch of sentences, an expected number."""
    return max(1, round(num_tokens * mask_prob))


def message_shape(config: RunConfig) -> tuple[int, int, int]:
    """The hidden tensor between layers and between stages [S, B, H]; S is local under sequence parallelism."""
    parallel, model = config.parallel, config.model
    cut = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return _local_length(model, parallel) // cut, config.train.micro_batch_size, model.hidden_size


def _local_length(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Tokens of a sample on a rank of the context-parallel axis."""
    return model.seq_length // parallel.context_parallel_size


def message_bytes(config: RunConfig) -> int:
    """Bytes of that tensor."""
    return prod(message_shape(config)) * BYTES[config.optim.precision]
