"""Collectives without gradients: each issued in one place, counted, and the identity on an axis of one rank.

The `start_` functions return at once with a `Pending`; the result may be used only after its `wait`. Overlap is
always written as such a pair, so that the order of things is visible where it matters.
Differentiable collectives are in `typed.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron3d.comm import pairwise
from megatron3d.comm.mesh import Axis
from megatron3d.comm.waiting import Waiting

LARGEST_TOGETHER = 1 << 20
"""Bytes of a tensor up to which waiting for a reduction of its own costs more than copying it."""
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# torch 2.13 renamed the two collectives on one flat tensor; older versions know only the first name.
_gather_flat: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_flat: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective on its way: `wait` returns its result once it is there."""

    def __init__(
        self, result: Tensor, work: pairwise.Work | None = None, axis: Axis | None = None, collective: str = ""
    ) -> None:
        """`axis` and `collective` name what is waited for; only a result that is there already needs none."""
        self._result, self._work = result, work
        self._axis, self._collective = axis, collective

    def wait(self) -> Tensor:
        """Block (on CUDA: make the current stream wait) until the result may be used, and return it.

        Raises: CollectiveError if a rank was lost or did not come in time.
        """
        if self._work is not None:
            assert self._axis is not None, "a collective on its way has an axis"
            with _waiting(self._collective, self._axis):
                self._work.wait()
            self._work = None
        return self._result

    @property
    def destination(self) -> Tensor:
        """Where the result is going to be, which nobody reads or writes before `wait`."""
        return self._result

    def is_done(self) -> bool:
        """Whether `wait` would return at once; False where the backend cannot tell."""
        return self._work is None or self._work.is_completed()


def start_all_reduce(x: Tensor, axis: Axis, *, reduction: str = "sum") -> Pending:
    """Reduce `x` over the axis, in place. `x` must be contiguous; reduction is "sum", "max" or "min"."""
    if axis.size == 1:
        return Pending(x)
    axis.meter.add(axis.name, "all_reduce", x.nbytes)
    return Pending(x, dist.all_reduce(x, _REDUCTIONS[reduction], group=axis.group, async_op=True), axis, "all_reduce")


def start_all_gather(x: Tensor, axis: Axis, *, into: Tensor | None = None) -> Pending:
    """Concatenate every rank's `x` along dimension 0: [n, ...] becomes [n * size, ...], in new memory or in the
    contiguous `into`, of which `x` is no part."""
    if axis.size == 1:
        return Pending(x if into is None else into.copy_(x))
    gathered = x.new_empty((x.shape[0] * axis.size, *x.shape[1:])) if into is None else into
    axis.meter.add(axis.name, "all_gather", gathered.nbytes)
    return Pending(gathered, _start_gather(gathered, x.contiguous(), axis), axis, "all_gather")


def start_all_gather_into(gathered: Tensor, x: Tensor, axis: Axis) -> Pending:
    """All-gather the one-dimensional `x` into the caller's buffer `whole`, of which `x` may be this rank's part."""
    if axis.size == 1:
        if gathered.data_ptr() != x.data_ptr():
            gathered.copy_(x)
        return Pending(gathered)
    axis.meter.add(axis.name, "all_gather", gathered.nbytes)
    return Pending(gathered, _gather_flat(gathered, x, group=axis.group, async_op=True), axis, "all_gather")


def start_reduce_scatter(x: Tensor, axis: Axis, *, into: Tensor | None = None) -> Pending:
    """Sum `x` over the axis and keep this rank's part along dimension 0: [n * size, ...] becomes [n, ...], in new
    memory or in the contiguous `into`, which is no part of `x`."""
    if axis.size == 1:
        return Pending(x if into is None else into.copy_(x))
    _require_divisible(x.shape[0], axis)
    part = x.new_empty((x.shape[0] // axis.size, *x.shape[1:])) if into is None else into
    axis.meter.add(axis.name, "reduce_scatter", x.nbytes)
    return Pending(part, _start_scatter(part, x.contiguous(), axis), axis, "reduce_scatter")


def start_reduce_scatter_into(part: Tensor, x: Tensor, axis: Axis) -> Pending:
    """Sum the one-dimensional `x` over the axis and keep this rank's part in the caller's `part`, which may be this
    rank's part of `x` itself. The rest of `x` is left as the backend leaves it."""
    if axis.size == 1:
        if part.data_ptr() != x.data_ptr():
            part.copy_(x)
        return Pending(part)
    _require_divisible(x.shape[0], axis)
    axis.meter.add(axis.name, "reduce_scatter", x.nbytes)
    return Pending(part, _scatter_flat(part, x, group=axis.group, async_op=True), axis, "reduce_scatter")


def all_reduce(x: Tensor, axis: Axis, *, reduction: str = "sum") -> Tensor:
    """`start_all_reduce` and wait."""
    return start_all_reduce(x, axis, reduction=reduction).wait()


def all_reduce_together(tensors: Sequence[Tensor], axis: Axis) -> None:
    """Add up contiguous tensors of one dtype over the axis, in place: the small ones in one reduction."""
    if axis.size == 1 or not tensors:
        return
    small = [one for one in tensors if one.nbytes <= LARGEST_TOGETHER]
    for one in tensors:
        if one.nbytes > LARGEST_TOGETHER:
            all_reduce(one, axis)
    if len(small) == 1:
        all_reduce(small[0], axis)
    elif small:
        sums = all_reduce(torch.cat([one.flatten() for one in small]), axis)
        for one, total in zip(small, sums.split([one.numel() for one in small]), strict=True):
            one.copy_(total.view(one.shape))


def all_gather(x: Tensor, axis: Axis, *, dim: int = 0) -> Tensor:
    """Concatenate every rank's `x` along `dim`, in rank order."""
    if axis.size == 1:
        return x
    if dim % x.dim() == 0:
        return start_all_gather(x, axis).wait()
    return start_all_gather(x.movedim(dim, 0), axis).wait().movedim(0, dim).contiguous()


def reduce_scatter(x: Tensor, axis: Axis, *, dim: int = 0) -> Tensor:
    """Sum over the axis, keep this rank's part along `dim`."""
    if axis.size == 1:
        return x
    if dim % x.dim() == 0:
        return start_reduce_scatter(x, axis).wait()
    return start_reduce_scatter(x.movedim(dim, 0), axis).wait().movedim(0, dim).contiguous()


def all_to_all(x: Tensor, axis: Axis, *, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Send each rank of the axis its own stretch of the one-dimensional `x`, and join what comes, in rank order.

    Args:
        x: the stretches one after another.
        axis: the ranks.
        send: elements for each rank.
        receive: elements from each rank, which must be what it sends here.
    """
    if axis.size == 1:
        return x
    arrived = x.new_empty(sum(receive))
    axis.meter.add(axis.name, "all_to_all", arrived.nbytes)
    with _waiting("all_to_all", axis):
        dist.all_to_all_single(arrived, x.contiguous(), list(receive), list(send), group=axis.group)
    return arrived


def own_part(x: Tensor, axis: Axis, *, dim: int = 0) -> Tensor:
    """This rank's part of `x` along `dim`, without communication."""
    if axis.size == 1:
        return x
    _require_divisible(x.shape[dim], axis)
    return x.chunk(axis.size, dim)[axis.rank].contiguous()


def broadcast(x: Tensor, axis: Axis, *, source: int = 0) -> Tensor:
    """Overwrite `x` with that of the rank at position `source` of the axis."""
    if axis.size == 1:
        return x
    axis.meter.add(axis.name, "broadcast", x.nbytes)
    with _waiting("broadcast", axis):
        dist.broadcast(x, src=axis.ranks[source], group=axis.group)
    return x


def gather_values(value: Any, axis: Axis) -> list[Any]:
    """Every rank's small Python value, in rank order, on every rank. For set-up and reports, not for the hot loop."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    with _waiting("gather_values", axis):
        dist.all_gather_object(values, value, group=axis.group)
    return values


def count_votes(vote: bool, host: Sequence[Axis]) -> int:
    """How many ranks vote yes, the same on every rank: a small reduction over each of the axes `Mesh.host`, which the
    device has no part in."""
    votes = torch.tensor(int(vote))
    for axis in host:
        votes = all_reduce(votes, axis)
    return int(votes)


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        all_reduce(torch.zeros(1, device=_device_of(axis)), axis)


def _start_gather(gathered: Tensor, x: Tensor, axis: Axis) -> pairwise.Work:
    """The contiguous `x` of all ranks into `gathered`, which holds nothing of it yet."""
    if axis.pairwise:
        return pairwise.start_all_gather(gathered, x, axis)
    return _gather_flat(gathered, x, group=axis.group, async_op=True)


def _start_scatter(part: Tensor, x: Tensor, axis: Axis) -> pairwise.Work:
    """The sum of the contiguous `x` of all ranks into their parts, which are no parts of it."""
    if axis.pairwise:
        return pairwise.start_reduce_scatter(part, x, axis)
    return _scatter_flat(part, x, group=axis.group, async_op=True)


def _waiting(collective: str, axis: Axis) -> Waiting:
    return Waiting(collective, axis.name, axis.ranks, axis.meter)


def _require_divisible(size: int, axis: Axis) -> None:
    if size % axis.size:
        raise ValueError(f"{size} elements do not divide among the {axis.size} ranks of {axis.name}")


def _device_of(axis: Axis) -> torch.device:
    backend = dist.get_backend(axis.group)
    return torch.device("cuda" if backend == "nccl" else "cpu")
