"""Mesh: a layout with live process groups, one `Axis` for each row of `layout.AXES`.

A layer receives the one axis it needs, never the mesh and never a global, so two layouts can live in one process.
An axis of size 1 has no group and its collectives are the identity: the same code is the single-process reference.

The groups come from `new_subgroups_by_enumeration` rather than `DeviceMesh`, because the former takes the timeout
after which a collective fails in its public interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron3d.comm.layout import AXES, GRID, Layout
from megatron3d.comm.meter import Meter

# These collectives run beside others of the same ranks: a tied table's reduction beside messages between stages, what
# all ranks agree on and what attention exchanges beside reductions of gradients. So they have groups of their own, by
# these names, even where the ranks are equal.
_OWN_GROUP = {"tied": "tied", "world": "world", "cp": "cp", "cp_heads": "cp", "cp_ring": "cp"}


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
    """A layout as one rank sees it: the axes of `layout.AXES` by their names, and `alone`, this rank by itself."""

    layout: Layout
    rank: int
    meter: Meter
    alone: Axis
    tp: Axis
    kv: Axis
    cp: Axis
    cp_heads: Axis
    cp_ring: Axis
    pp: Axis
    batch: Axis
    grad: Axis
    shard: Axis
    replica: Axis
    expert_tp: Axis
    expert: Axis
    expert_grad: Axis
    expert_shard: Axis
    expert_replica: Axis
    tied: Axis
    world: Axis

    def axis(self, name: str) -> Axis:
        """The axis of a name of `layout.AXES`."""
        return {one.name: one for one in vars(self).values() if isinstance(one, Axis)}[name]

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
        timeout: after this long a collective of these groups fails.

    Raises:
        ValueError: the layout has another number of ranks.
    """
    initialised = dist.is_initialized()
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if initialised else (1, 0)
    if layout.world_size != world_size:
        raise ValueError(f"layout {layout} needs {layout.world_size} ranks, there are {world_size}")
    meter, made, axes = Meter(), {}, {}
    for name in AXES:
        ranks, groups = layout.ranks_along(name, rank), tuple(layout.groups(name))
        key = (_OWN_GROUP.get(name, ""), groups)
        if key not in made:
            made[key] = _new_groups(groups, timeout)
        group = made[key] if len(ranks) > 1 else None
        pairwise = group is not None and dist.get_backend(group) == "gloo"
        axes[name] = Axis(name, len(ranks), ranks.index(rank), ranks, group, meter, pairwise)
    return Mesh(layout, rank, meter, Axis("alone", 1, 0, (rank,), None, meter), **axes)


def _new_groups(groups: tuple[tuple[int, ...], ...], timeout: timedelta) -> dist.ProcessGroup | None:
    """Make process groups of the groups of several ranks, and return this rank's."""
    several = [list(group) for group in groups if len(group) > 1]
    if not several:
        return None
    own = dist.new_subgroups_by_enumeration(several, timeout=timeout)[0]
    return own if isinstance(own, dist.ProcessGroup) else None  # torch gives -1 to a rank that is in none
