"""Mesh: a layout with live process groups, one `Axis` per kind of parallelism.

A layer receives the one axis it needs, never the mesh and never a global, so two layouts can live in one process.
An axis of size 1 has no group and its collectives are the identity: the same code is the single-process reference.

The groups come from `new_subgroups_by_enumeration` rather than `DeviceMesh`, because the former takes the timeout
after which a collective fails in its public interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron3d.comm.layout import AXES, Layout
from megatron3d.comm.meter import Meter


@dataclass(frozen=True)
class Axis:
    """The ranks that this rank shares one kind of work with.

    Attributes:
        name: "tp", "cp", "dp", "pp", "shard" and "replica" (the two axes that hierarchical ZeRO cuts dp into), "tied"
            (holders of the tied embedding), "world", or "alone" (this rank by itself).
        size: number of ranks.
        rank: own position among them.
        ranks: their global ranks, in order.
        group: the process group, None where size is 1.
        meter: counts what is communicated.
    """

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    meter: Meter


@dataclass(frozen=True)
class Mesh:
    """A layout as one rank sees it.

    `shard` are the data-parallel ranks that share ZeRO's state out (`dp` itself where that is all of them) and
    `replica` those that own the same part.
    """

    layout: Layout
    rank: int
    tp: Axis
    cp: Axis
    dp: Axis
    pp: Axis
    shard: Axis
    replica: Axis
    alone: Axis
    tied: Axis
    world: Axis
    meter: Meter

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank is last along the pipeline."""
        return self.pp.rank == self.pp.size - 1

    def __str__(self) -> str:
        position = self.layout.coordinates(self.rank)
        where = ", ".join(f"{axis} {position[axis]}" for axis in AXES if self.layout.size(axis) > 1)
        return f"rank {self.rank} of {self.layout.world_size} ({self.layout}{': ' + where if where else ''})"


def make_mesh(layout: Layout, *, timeout: timedelta = timedelta(minutes=10)) -> Mesh:
    """Build the groups of a layout; every rank of the initialised process group must call this in the same order.

    Args:
        layout: its world size must be that of the default process group, or 1 in a process without one.
        timeout: after this long a collective of these groups fails.
    """
    initialised = dist.is_initialized()
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if initialised else (1, 0)
    if layout.world_size != world_size:
        raise ValueError(f"layout {layout} needs {layout.world_size} ranks, there are {world_size}")
    meter = Meter()

    def axis(name: str, groups: list[tuple[int, ...]]) -> Axis:
        mine = next(group for group in groups if rank in group)
        shared = [list(group) for group in groups if len(group) > 1]
        group = None
        if shared:
            found, _ = dist.new_subgroups_by_enumeration(shared, timeout=timeout)
            group = found if len(mine) > 1 else None
        return Axis(name, len(mine), mine.index(rank), mine, group, meter)

    axes = {name: axis(name, layout.groups(name)) for name in AXES}
    alone = Axis("alone", 1, 0, (rank,), None, meter)
    shard, replica = axes["dp"], alone
    if layout.shard_size == 1:
        shard, replica = alone, axes["dp"]
    elif layout.shard_size < layout.dp:
        shard, replica = axis("shard", layout.shard_groups()), axis("replica", layout.replica_groups())
    tied = axis("tied", layout.tied_groups())
    world = axis("world", [tuple(range(world_size))])
    return Mesh(
        layout=layout,
        rank=rank,
        shard=shard,
        replica=replica,
        alone=alone,
        tied=tied,
        world=world,
        meter=meter,
        **axes,
    )
