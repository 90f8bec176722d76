"""Host memory that `--async-save` holds: a copy of what a rank writes into a checkpoint, kept from save to save."""

from __future__ import annotations

from megatron3d.config.sections.checkpoint import CheckpointConfig
from megatron3d.config.sections.optim import OptimConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.planner.layout import layout_of
from megatron3d.planner.memory import RankModel, moment_bytes, shard_size
from megatron3d.planner.sizes import BYTES, FP32
from megatron3d.zero.flat import FlatLayout
from megatron3d.zero.kinds import KINDS


def save_copy_bytes(
    parallel: ParallelConfig, optim: OptimConfig, checkpoint: CheckpointConfig, parts: RankModel
) -> int:
    """About what the fullest rank of a pipeline position copies; 0 without `--async-save`.

    Where several ranks hold the same, each writes some of the parameters, so that none has much more than its part of
    the whole, or than the largest of them. Headers and documents are not counted.
    """
    if not checkpoint.saves_asynchronously:
        return 0
    total, largest = 0, 0
    for unit in parts.units.values():
        held, of_one = _held(parallel, optim, unit, with_optimizer=not checkpoint.no_save_optim)
        copies = max(1, layout_of(parallel).size(KINDS[unit.kind].grad) // shard_size(parallel, unit.kind))
        total += held // copies
        largest = max(largest, of_one if copies > 1 else 0)
    return max(total, largest)


def _held(parallel: ParallelConfig, optim: OptimConfig, unit: FlatLayout, *, with_optimizer: bool) -> tuple[int, int]:
    """Bytes that a rank holds of what is saved of a unit, and of the weights of its largest parameter."""
    own = unit.slice_of(0, shard_size(parallel, unit.kind))
    lengths = [slot.span.intersect(own).length for slot in unit.slots if not slot.spec.tied_copy]
    if not lengths:
        return 0, 0
    element, moments = FP32 if unit.trains else BYTES[optim.precision], 0
    if unit.trains and with_optimizer:
        moments = moment_bytes(optim, unit, own)
        element += BYTES[optim.precision] if parallel.offload_delayed_update else 0
    return sum(lengths) * element + moments, max(lengths) * element
