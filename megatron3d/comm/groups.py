"""Process groups of a partition of all ranks: every rank makes its own, with one call.

`torch.distributed.new_group` is entered by all ranks for every group, also for those they are not in: 449 times a rank
with tensor 8, pipeline 8 and data 16. Here NCCL splits the communicator of all ranks once for all groups of a
partition, and elsewhere a rank enters the group it belongs to and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

Groups = Sequence[tuple[int, ...]]


def make_own_group(groups: Groups, *, timeout: timedelta, on_host: bool = False) -> dist.ProcessGroup | None:
    """This rank's group of a partition of all ranks; None of a partition into single ranks.

    Every rank calls this, for the same partitions in the same order, as partitions overlap. A rank that is alone in one
    where others are not makes a group of itself: torch names a group by its ranks and by how many groups the process
    has, and so all ranks must have equally many, or those made later would wait for each other under different names.

    Args:
        groups: all of them; together they hold each rank once.
        timeout: after this long a collective of the group fails.
        on_host: use gloo whatever the device, for numbers that the host reads.
    """
    if all(len(group) == 1 for group in groups):
        return None
    world = dist.group.WORLD
    assert world is not None, "process groups are made after the processes have met"
    if world.bound_device_id is not None and not on_host:
        return dist.split_group(split_ranks=[list(group) for group in groups], timeout=timeout)
    own = next(group for group in groups if dist.get_rank() in group)
    backend = "gloo" if on_host else None
    made = dist.new_group(list(own), timeout=timeout, backend=backend, use_local_synchronization=True)
    return made if isinstance(made, dist.ProcessGroup) else None  # a number where this rank is not in it
