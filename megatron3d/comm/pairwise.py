"""All-gathers and reduce-scatters in which every two ranks exchange their parts directly, for gloo.

Gloo has no reduce-scatter: torch's is an all-reduce of a copy, of which a part is kept. Its all-gather copies what it
brings. Here both are an all-to-all, which sends each rank its part at once: (n - 1) / n of the tensor, as a ring does.
Parts that arrive are added by whoever waits for the sum. An exchange under way belongs to the backend, as any
collective does, so one that nobody waits for still ends on all ranks. Two ranks send nothing to themselves, and so need
no copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron3d.comm.mesh import Axis


class Work(Protocol):
    """What `torch.distributed` and this file give for a collective under way."""

    def wait(self) -> object:
        """Block until it is over."""
        ...

    def is_completed(self) -> bool:
        """Whether `wait` would return without waiting for another rank."""
        ...


class _Sum:
    """Parts that arrive and are to be added up."""

    def __init__(self, exchange: dist.Work, add_up: Callable[[], object]) -> None:
        """`add_up` may be called once `exchange` is over."""
        self._exchange, self._add_up = exchange, add_up

    @torch.no_grad()
    def wait(self) -> None:
        """Block until they are there, and add them up."""
        self._exchange.wait()
        self._add_up()

    def is_completed(self) -> bool:
        """Whether all of them are there."""
        return self._exchange.is_completed()


@torch.no_grad()
def start_all_gather(gathered: Tensor, x: Tensor, axis: Axis) -> Work:
    """Fill `gathered` [n * size, ...] with every rank's `x` [n, ...]; both contiguous."""
    if axis.size > 2:
        return _start_exchange(gathered, torch.cat([x] * axis.size), axis)
    parts = gathered.view(2, *x.shape)
    exchange = _start_swap(parts[1 - axis.rank], x, axis)
    parts[axis.rank].copy_(x)
    return exchange


def start_reduce_scatter(part: Tensor, x: Tensor, axis: Axis) -> Work:
    """Sum `x` [n * size, ...] over the ranks into `part` [n, ...]; both contiguous."""
    if axis.size > 2:
        arriving = torch.empty_like(x)
        # Sums of 16 bits are made in fp32 and rounded once.
        add_up = partial(torch.sum, arriving.view(axis.size, *part.shape), 0, out=part)
        return _Sum(_start_exchange(arriving, x, axis), add_up)
    parts, arriving = x.view(2, *part.shape), torch.empty_like(part)
    exchange = _start_swap(arriving, parts[1 - axis.rank], axis)
    return _Sum(exchange, partial(torch.add, parts[axis.rank], arriving, out=part))


def _start_swap(arriving: Tensor, leaving: Tensor, axis: Axis) -> dist.Work:
    """Start exchanging `leaving` and `arriving` with the other one of two ranks."""
    count = len(leaving)
    return _start_exchange(arriving, leaving, axis, lengths=[0, count] if axis.rank == 0 else [count, 0])


def _start_exchange(arriving: Tensor, leaving: Tensor, axis: Axis, *, lengths: Sequence[int] = ()) -> dist.Work:
    """Start sending each rank its part of `leaving` and receiving one from each into `arriving`, in rank order, with
    parts of these `lengths` in both directions, or equal ones."""
    work = dist.all_to_all_single(arriving, leaving, list(lengths), list(lengths), group=axis.group, async_op=True)
    assert work is not None, "every rank of an axis is in its group"
    return work
