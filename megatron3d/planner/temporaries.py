"""What the optimizer takes for a while when it updates, by optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from megatron3d.config.run import RunConfig
from megatron3d.config.sections.optim import OptimConfig
from megatron3d.config.update_rules import UPDATE_RULES
from megatron3d.optim.flat import CHUNK_CPU, CHUNK_DEVICE
from megatron3d.planner.memory import shard_size
from megatron3d.planner.sizes import BYTES, FP32
from megatron3d.zero.flat import FlatLayout, Slot
from megatron3d.zero.policy import policy_of


def publish_temporary(config: RunConfig, units: Iterable[FlatLayout], *, device_type: str) -> int:
    """Bytes that the gathers of updated weights take for themselves: gloo's as much again as they bring."""
    if device_type != "cpu" or shard_size(config.parallel) == 1 or policy_of(config.parallel.zero_stage).shard_params:
        return 0
    return sum(layout.length for layout in units if layout.trains) * BYTES[config.optim.precision]


def update_temporary(config: RunConfig, units: Iterable[FlatLayout], *, device_type: str) -> int:
    """Bytes that an update takes at most at once, beside the state; torch's fused ones take none.

    Elementwise updates work on chunks; Adafactor on one matrix; Muon on one whole matrix, with a momentum of the size
    of it, two factors in the dtype of its products and their two Gram matrices.
    """
    optim, layouts = config.optim, [layout for layout in units if layout.trains]
    largest = max((_largest_piece(layout) for layout in layouts), default=0)
    chunk = min(CHUNK_CPU if device_type == "cpu" else CHUNK_DEVICE, largest) * FP32
    widened = chunk * ((optim.exp_avg_dtype == "bf16") + (optim.exp_avg_sq_dtype == "bf16"))
    matrices = [slot for layout in layouts for slot in layout.slots if slot.spec.is_hidden_matrix]
    if optim.optimizer == "muon":
        return max([_orthogonal(optim, slot) for slot in matrices], default=0)
    if optim.optimizer == "adafactor":
        return max([FP32 * prod(slot.shape) for layout in layouts for slot in layout.slots], default=0)
    return widened + chunk * UPDATE_RULES[optim.optimizer].scratch_numbers


def _largest_piece(layout: FlatLayout) -> int:
    return layout.length


def _orthogonal(optim: OptimConfig, slot: Slot) -> int:
    rows, columns = slot.spec.shape
    small = min(rows, columns)
    product = FP32 if optim.muon_fp32_matmul_prec == "high" else 2
    return 2 * FP32 * rows * columns + product * (2 * rows * columns + 2 * small * small)
