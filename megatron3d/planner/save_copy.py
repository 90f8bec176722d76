"""Host memory that `--async-save` holds: a copy of what a rank writes into a checkpoint, kept from save to save."""

from __future__ import annotations

from megatron3d.comm.layout import Layout
from megatron3d.config.run import RunConfig
from megatron3d.planner.layout import layout_of
from megatron3d.planner.memory import RankModel, moment_bytes, shard_size
from megatron3d.planner.sizes import BYTES, FP32
from megatron3d.zero.flat import FlatLayout
from megatron3d.zero.kinds import KINDS


def save_copy_bytes(config: RunConfig, parts: RankModel) -> int:
    """About what the fullest rank of a pipeline position copies; 0 without `--async-save`.

    Where several ranks hold the same, each writes some of the parameters, so that none has much more than its part of
    the whole, or than the largest of them. Headers and documents are not counted.
    """
    if not config.checkpoint.saves_asynchronously:
        return 0
    layout = layout_of(config.parallel, query_groups=config.model.num_query_groups)
    whole, largest = 0, 0
    for unit in parts.units.values():
        held, of_one = _held(config, unit)
        copies = _copies(config, layout, unit)
        whole += held // copies
        largest = max(largest, of_one if copies > 1 else 0)
    return max(whole, largest)


def _held(config: RunConfig, unit: FlatLayout) -> tuple[int, int]:
    """Bytes that a rank holds of what is saved of a unit, and of the largest parameter of them."""
    ranks = shard_size(config.parallel, unit.kind)
    own = unit.slice_of(0, ranks)
    lengths = [slot.span.intersect(own).length for slot in unit.slots if not slot.spec.tied_copy]
    element, moments = FP32 if unit.trains else BYTES[config.optim.precision], 0
    if unit.trains and not config.checkpoint.no_save_optim:
        moments = moment_bytes(config.optim, unit, own)
        element += BYTES[config.optim.precision] if config.parallel.offload_delayed_update else 0
    return sum(lengths) * element + (moments if lengths else 0), max(lengths, default=0) * element


def _copies(config: RunConfig, layout: Layout, unit: FlatLayout) -> int:
    """How many ranks hold the same part of a unit."""
    return max(1, layout.size(KINDS[unit.kind].grad) // shard_size(config.parallel, unit.kind))
