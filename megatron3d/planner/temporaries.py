"""What the optimizer takes for a while when it updates, by optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from math import prod

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.update_rules import UPDATE_RULES
from megatron3d.optim.flat import CHUNK_CPU, CHUNK_DEVICE
from megatron3d.params.spec import ParamKind
from megatron3d.planner.layout import layout_of
from megatron3d.planner.memory import shard_size
from megatron3d.planner.sizes import BYTES, FP32
from megatron3d.zero.flat import FlatLayout, Slot
from megatron3d.zero.full_parameters import assign_owners, tile_elements, tiles_of
from megatron3d.zero.kinds import KINDS
from megatron3d.zero.policy import policy_of


def publish_temporary(
    parallel: ParallelConfig, optim: OptimConfig, units: Iterable[FlatLayout], *, device_type: str
) -> int:
    """Bytes that the gathers of updated weights take for themselves: gloo's as much again as they bring."""
    if device_type != "cpu" or shard_size(parallel) == 1 or policy_of(parallel.zero_stage).shard_params:
        return 0
    return sum(layout.length for layout in units if layout.trains) * BYTES[optim.precision]


def update_temporary(
    parallel: ParallelConfig, optim: OptimConfig, units: Iterable[FlatLayout], *, device_type: str
) -> int:
    """Bytes that an update takes at most at once, beside the state; torch's fused ones take none.

    Elementwise updates work on chunks; Adafactor on one matrix; Muon on one whole matrix at a time of those that are
    exchanged together.
    """
    layouts = [layout for layout in units if layout.trains]
    largest = max((_largest_piece(layout) for layout in layouts), default=0)
    chunk = min(CHUNK_CPU if device_type == "cpu" else CHUNK_DEVICE, largest) * FP32
    widened = chunk * ((optim.exp_avg_dtype == "bf16") + (optim.exp_avg_sq_dtype == "bf16"))
    if optim.optimizer == "muon":
        of_kind: dict[ParamKind, list[FlatLayout]] = {
            kind: [one for one in layouts if one.kind == kind] for kind in KINDS
        }
        most = tile_elements(device_type)
        return max(_full_matrices(parallel, optim, found, kind, most=most) for kind, found in of_kind.items())
    if optim.optimizer == "adafactor":
        return max([FP32 * prod(slot.shape) for layout in layouts for slot in layout.slots], default=0)
    if optim.optimizer in ("adam", "adamw") and device_type != "cpu":
        return 0  # one kernel, which widens bf16 moments as it reads them
    return widened + chunk * UPDATE_RULES[optim.optimizer].scratch_numbers


def _largest_piece(layout: FlatLayout) -> int:
    return layout.length


def _full_matrices(
    parallel: ParallelConfig, optim: OptimConfig, layouts: Sequence[FlatLayout], kind: ParamKind, *, most: int
) -> int:
    """The most that `FullParameters.map_full` and Muon's function of a matrix take on any rank that shares these."""
    num_shards, tp = shard_size(parallel, kind), layout_of(parallel).size(KINDS[kind].tensor)
    placed = [(layout, slot) for layout in layouts for slot in layout.slots if slot.spec.is_hidden_matrix]
    specs = [slot.spec for _, slot in placed]
    owners = assign_owners(specs, shard=num_shards, tp=tp)
    found, tiles = [0], tiles_of(specs, owners, most=most)
    for shard_rank, tp_rank, tile in product(range(num_shards), range(tp), tiles):
        travel = [(*placed[number], owners[number]) for number in tile]
        held = sum(slot.span.intersect(layout.slice_of(shard_rank, num_shards)).length for layout, slot, _ in travel)
        fetched = [(slot, owner) for _, slot, owner in travel if owner.shard_rank == shard_rank]
        cut = sum(prod(slot.shape) for slot, owner in fetched if owner.tp_rank is not None)
        equal = sum(prod(slot.shape) for slot, owner in fetched if owner.tp_rank is None)
        mine = [slot for slot, owner in fetched if owner.tp_rank in (tp_rank, None)]
        full = sum(slot.spec.numel for slot in mine if not slot.spec.is_replicated)
        exchanged = _exchange_elements(held, cut=cut, equal=equal, full=full, num_shards=num_shards, tp=tp)
        stays = (full if tp > 1 else cut if num_shards > 1 else 0) + (equal if num_shards > 1 else 0)
        work = max([_orthogonal(optim, slot) for slot in mine], default=0)
        found += [FP32 * exchanged, FP32 * stays + work]
    return max(found)


def _exchange_elements(held: int, *, cut: int, equal: int, full: int, num_shards: int, tp: int) -> int:
    """The most elements at once in the exchanges of `FullParameters`: what is sent and what arrives, beside what both
    are made of.

    Args:
        held: elements of this rank's parts.
        cut, equal: of the shards that it fetches of matrices that the tensor ranks shard, and hold alike.
        full: of the full matrices that it owns and the tensor ranks shard.
        num_shards, tp: ranks of the two axes.
    """
    shards = cut + equal
    moments = [0]
    if num_shards > 1:
        moments += [held + shards, 2 * shards]
        moments += [2 * shards + held + (full if tp > 1 else 0)]  # the way back
    if tp > 1:
        fetched = shards if num_shards > 1 else 0
        moments += [fetched + cut + full, fetched + 2 * full]
        moments += [3 * full + cut + (equal if num_shards > 1 else 0)]  # the way back
    return max(moments)


def _orthogonal(optim: OptimConfig, slot: Slot) -> int:
    """A momentum of the size of the matrix, two factors in the dtype of its products, their two Gram matrices."""
    rows, columns = slot.spec.shape
    small = min(rows, columns)
    product = FP32 if optim.muon_fp32_matmul_prec == "high" else 2
    return 2 * FP32 * rows * columns + product * (2 * rows * columns + 2 * small * small)
