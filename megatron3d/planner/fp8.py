"""Weights that are cast to fp8 once for a step: their bytes, and stages that find them cast when a record begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from megatron3d.models.stage import Stage
from megatron3d.planner.recording import StorageRecorder
from megatron3d.tensor.fp8 import cast_weight
from megatron3d.tensor.linear import ColumnParallelLinear, RowParallelLinear

_ELEMENT_BYTES = {"cpu": 1, "cuda": 2}
"""For each weight: on a CPU its transpose is a view. Scales are left out: at most 4 bytes for 128 x 128 weights."""


def cast_weight_bytes(stages: Iterable[nn.Module], *, device_type: str) -> int:
    """Bytes that stay for a step, of weights that do not come and go themselves."""
    return sum(
        _ELEMENT_BYTES[device_type] * layer.weight.numel()
        for stage in stages
        for layer in _layers_in_fp8(stage)
        if layer.context.fp8 is not None and layer.context.fp8.weights.keeps
    )


@contextmanager
def weights_cast(stage: Stage, recorder: StorageRecorder) -> Iterator[None]:
    """Within the context the weights of a stage have been cast by an earlier micro-batch, where they stay."""
    fp8 = stage.context.fp8
    if fp8 is None or not fp8.weights.keeps:
        yield
        return
    with fp8.weights.unchanged():
        for layer in _layers_in_fp8(stage):
            recorder.ignore(_tensors(layer))
        yield


def _tensors(layer: ColumnParallelLinear | RowParallelLinear) -> Iterator[Tensor]:
    largest, pair = cast_weight(layer.weight, layer.context)
    if largest is not None:
        yield largest
    for operand in pair:
        assert operand is not None, "a cast that is kept has both orientations"
        yield from (operand.data_RK, operand.scale)


def _layers_in_fp8(stage: nn.Module) -> Iterator[ColumnParallelLinear | RowParallelLinear]:
    for module in stage.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.context.fp8 is not None:
            yield module
