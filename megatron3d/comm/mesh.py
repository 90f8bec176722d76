"""Mesh: a layout with live process groups, one `Axis` for each row of `layout.AXES`.

A layer receives the one axis it needs, never the mesh and never a global, so two layouts can live in one process.
An axis of size 1 has no group and its collectives are the identity: the same code is the single-process reference.

The groups come from `groups.py` rather than `DeviceMesh`, so that they have the timeout after which a collective fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron3d.comm.groups import make_own_group
from megatron3d.comm.layout import AXES, GRID, Layout
from megatron3d.comm.meter import Meter

# A group's collectives run one after another. These run beside others of the same ranks: a tied table's reduction
# beside messages between stages, and what attention exchanges and gathers of weights beside reductions of gradients. So
# they have groups of their own, by these names, even where the ranks are equal. What all ranks agree on has the group
# in which they met, which no other axis uses.
_OWN_GROUP = {
    "tied": "tied",
    "world": "world",
    "cp": "cp",
    "cp_heads": "cp",
    "cp_ring": "cp",
    "gather": "gather",
    "expert_gather": "gather",
}

# The axes along each coordinate of the grid: a sum over one after another is a sum over all ranks.
_BY_COORDINATE = ("tp", "cp", "batch", "pp")


@dataclass(frozen=True)
class Axis:
    """The ranks that this rank shares one kind of work with.

    Attributes:
        name: a name of `layout.AXES`, or "alone" (this rank by itself).
        size: number of ranks.
        rank: own position among them.
        ranks: their global ranks, in order.
        group: the process group, None where size is 1.
        meter: counts what is communicated.
        pairwise: whether gathers and reduce-scatters of activations go pair by pair (`pairwise.py`), as on gloo.
    """

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    meter: Meter
    pairwise: bool = False


@dataclass(frozen=True)
class Mesh:
    """A layout as one rank sees it: the axes of `layout.AXES` by their names, and `alone`, this rank by itself.

    `host` are the axes tp, cp, batch and pp once more, for numbers that the host has and reads: their groups are of
    gloo whatever the device, so that nothing waits for what is queued on it. Along one after another they reach all
    ranks, with fewer connections than a group of all ranks has.
    """

    layout: Layout
    rank: int
    meter: Meter
    alone: Axis
    host: tuple[Axis, ...]
    tp: Axis
    kv: Axis
    cp: Axis
    cp_heads: Axis
    cp_ring: Axis
    pp: Axis
    batch: Axis
    grad: Axis
    shard: Axis
    gather: Axis
    replica: Axis
    expert_tp: Axis
    expert: Axis
    expert_grad: Axis
    expert_shard: Axis
    expert_gather: Axis
    expert_replica: Axis
    tied: Axis
    world: Axis

    def axis(self, name: str) -> Axis:
        """The axis of a name of `layout.AXES`."""
        return {one.name: one for one in vars(self).values() if isinstance(one, Axis)}[name]

    @property
    def host_batch(self) -> Axis:
        """The axis `batch` among those of the host."""
        return self.host[_BY_COORDINATE.index("batch")]

    @property
    def reports_samples(self) -> bool:
        """Whether this rank counts in sums over all ranks of what is known of whole samples: tensor- and
        context-parallel ranks read the same ones, and one of them reports."""
        return self.tp.rank == self.cp.rank == 0

    def __str__(self) -> str:
        position = self.layout.coordinates(self.rank)
        where = ", ".join(f"{name} {position[name]}" for name in GRID if self.layout.degree(name) > 1)
        return f"rank {self.rank} of {self.layout.world_size} ({self.layout}{': ' + where if where else ''})"


def make_mesh(layout: Layout, *, timeout: timedelta = timedelta(minutes=10)) -> Mesh:
    """Build the groups of a layout; every rank of the initialised process group must call this in the same order.

    Axes with the same groups of ranks share their process groups, apart from those of `_OWN_GROUP`.

    Args:
        layout: its world size must be that of the default process group, or 1 in a process without one.
        timeout: after this long a collective of these groups fails; those of `world` have the default group's.

    Raises:
        ValueError: the layout has another number of ranks.
    """
    initialised = dist.is_initialized()
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if initialised else (1, 0)
    if layout.world_size != world_size:
        raise ValueError(f"layout {layout} needs {layout.world_size} ranks, there are {world_size}")
    meter, made, axes = Meter(), {}, {}
    for name in AXES:
        ranks, groups = layout.ranks_along(name, rank), tuple(layout.groups(name) if layout.size(name) > 1 else ())
        key = (_OWN_GROUP.get(name, ""), groups)
        if key not in made:
            made[key] = dist.group.WORLD if name == "world" else make_own_group(groups, timeout=timeout)
        axes[name] = _axis(name, ranks, rank, made[key], meter)
    host = tuple(_host_axis(axes[name], layout, rank, timeout) for name in _BY_COORDINATE)
    return Mesh(layout, rank, meter, Axis("alone", 1, 0, (rank,), None, meter), host, **axes)


def _axis(name: str, ranks: tuple[int, ...], rank: int, made: dist.ProcessGroup | None, meter: Meter) -> Axis:
    group = made if len(ranks) > 1 else None
    pairwise = group is not None and dist.get_backend(group) == "gloo"
    return Axis(name, len(ranks), ranks.index(rank), ranks, group, meter, pairwise)


def _host_axis(axis: Axis, layout: Layout, rank: int, timeout: timedelta) -> Axis:
    """The same ranks in a group of the host, which an axis on gloo has already."""
    if axis.pairwise or axis.size == 1:
        return axis
    group = make_own_group(layout.groups(axis.name), timeout=timeout, on_host=True)
    return _axis(axis.name, axis.ranks, rank, group, axis.meter)
