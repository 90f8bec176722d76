"""All-gathers and reduce-scatters by messages between every two ranks, for gloo.

Gloo has no reduce-scatter: torch's is an all-reduce of a copy, of which a part is kept, and its all-gather copies what
it brings. Here each rank sends every other rank its part at once. A rank sends as many bytes as in a ring, (n - 1) / n
of the tensor; nothing is copied, and arriving parts are added by whoever waits for the sum.

All ranks of a group start these in the same order, as any collectives, and gloo delivers the messages of two ranks in
the order in which they were posted. So one tag, which no message between pipeline stages has, serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron3d.comm.mesh import Axis

TAG = 1 << 30  # those of pipelines count from 0


class Work(Protocol):
    """What `torch.distributed` and this file give for a collective on its way."""

    def wait(self) -> object:
        """Block until it is over."""
        ...

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        ...


class Exchange:
    """Parts on their way between this rank and all others."""

    def __init__(
        self, works: Sequence[dist.Work], own: Tensor, arriving: Sequence[Tensor] = (), *, total: Tensor
    ) -> None:
        """`own` and what is `arriving` are added into `total`, which may be `own` itself; nothing is, where none is."""
        self._works, self._own, self._arriving, self._total = works, own, arriving, total

    def wait(self) -> None:
        """Block until all parts have come and gone, and add them up in the order of the ranks behind the own one."""
        for work in self._works:
            work.wait()
        for addend in self._arriving:
            torch.add(self._own, addend, out=self._total)
            self._own = self._total
        self._works = self._arriving = ()

    def is_completed(self) -> bool:
        """Whether nothing is on its way and nothing is left to add."""
        return not self._works


def start_all_gather(gathered: Tensor, x: Tensor, axis: Axis) -> Exchange:
    """Fill `gathered` [n * size, ...] with every rank's contiguous `x` [n, ...], which may be the own part of it."""
    parts = gathered.view(axis.size, *x.shape)
    if parts[axis.rank].data_ptr() != x.data_ptr():
        parts[axis.rank].copy_(x)
    works = _exchange([x] * axis.size, parts, axis)
    return Exchange(works, x, total=gathered)


def start_reduce_scatter(part: Tensor, x: Tensor, axis: Axis) -> Exchange:
    """Sum the contiguous `x` [n * size, ...] over the ranks into `part` [n, ...], which may be the own part of it."""
    parts = x.view(axis.size, *part.shape)
    arriving = [torch.empty_like(part) for _ in range(axis.size - 1)]
    rank = axis.rank
    works = _exchange(parts, [*arriving[:rank], part, *arriving[rank:]], axis)
    # Counted from this rank, so that no rank's part comes first in all sums.
    in_order = arriving[rank:] + arriving[:rank]
    return Exchange(works, parts[rank], in_order, total=part)


def _exchange(outgoing: Sequence[Tensor] | Tensor, incoming: Sequence[Tensor] | Tensor, axis: Axis) -> list[dist.Work]:
    """Post a send and a receive for each other rank of the axis, beginning behind this one."""
    works: list[dist.Work | None] = []
    for step in range(1, axis.size):
        to, source = (axis.rank + step) % axis.size, (axis.rank - step) % axis.size
        works.append(dist.irecv(incoming[source], axis.ranks[source], group=axis.group, tag=TAG))
        works.append(dist.isend(outgoing[to], axis.ranks[to], group=axis.group, tag=TAG))
    return [work for work in works if work is not None]
