"""Differentiable collectives, named by what the ranks of an axis hold before and after.

Four words say what a tensor is over the ranks of an axis, and so what its gradient is:

    R  replicated: the same everywhere, used differently by each rank    gradient P
    I  invariant:  the same everywhere, used alike by all                 gradient I
    V  varying:    each rank has its own shard                            gradient V
    P  partial:    the value is the sum over the ranks                    gradient R

The backward of each function follows from the types alone: the gradient of an output of type P is R, and so on; the
function back from dst to src is then the collective that turns the gradient's type into the one needed.

Functions that communicate on the way forward take the `Replay` of their layer, from which a second run of the forward
gets the result of the first.

Source: the notation is that of JAX's `shard_map` with varying manual axes, extended by the partial type; the pairs of
forward and backward are those of Shoeybi et al. 2019 (Megatron-LM, section 3) and Korthikanti et al. 2022, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megatron3d.comm import collectives
from megatron3d.comm.mesh import Axis
from megatron3d.comm.replay import Replay


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dst: str, replay: Replay) -> Tensor:
        ctx.axis, ctx.dst = axis, dst
        return replay.run(lambda: collectives.all_reduce(x.clone(memory_format=torch.contiguous_format), axis))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.dst == "I":
            return grad, None, None, None
        return collectives.all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None, None, None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return collectives.all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dst: str, dim: int, replay: Replay) -> Tensor:
        ctx.axis, ctx.dst, ctx.dim = axis, dst, dim
        return replay.run(lambda: collectives.all_gather(x, axis, dim=dim))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        back = collectives.own_part if ctx.dst == "I" else collectives.reduce_scatter
        return back(grad, ctx.axis, dim=ctx.dim), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, replay: Replay) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return replay.run(lambda: collectives.reduce_scatter(x, axis, dim=dim))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return collectives.all_gather(grad, ctx.axis, dim=ctx.dim), None, None, None


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return collectives.own_part(x, axis, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return collectives.all_gather(grad, ctx.axis, dim=ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int], replay: Replay) -> Tensor:
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return replay.run(lambda: _rows_to_all(x, axis, send, receive))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _rows_to_all(grad, ctx.axis, ctx.receive, ctx.send), None, None, None, None


def _rows_to_all(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    width = x.shape[1]
    sent, received = ([rows * width for rows in sizes] for sizes in (send, receive))
    return collectives.all_to_all(x.reshape(-1), axis, send=sent, receive=received).view(-1, width)


def all_reduce(x: Tensor, axis: Axis, *, dst: Literal["R", "I"], replay: Replay | None = None) -> Tensor:
    """P to R or I: the sum over the ranks. Backward: to I the identity, to R an all-reduce."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis, dst, replay or Replay())


def replicate(x: Tensor, axis: Axis) -> Tensor:
    """I to R: the same tensor, about to be used differently by each rank. Backward: an all-reduce."""
    return x if axis.size == 1 else _Replicate.apply(x, axis)


def all_gather(x: Tensor, axis: Axis, *, dst: Literal["R", "I"], dim: int = 0, replay: Replay | None = None) -> Tensor:
    """V to R or I: shards side by side along `dim`. Backward: to R a reduce-scatter, to I this rank's part."""
    return x if axis.size == 1 else _AllGather.apply(x, axis, dst, dim, replay or Replay())


def reduce_scatter(x: Tensor, axis: Axis, *, dim: int = 0, replay: Replay | None = None) -> Tensor:
    """P to V: this rank's part along `dim` of the sum. Backward: an all-gather."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim, replay or Replay())


def shard(x: Tensor, axis: Axis, *, dim: int = 0) -> Tensor:
    """I to V: this rank's part along `dim`. Backward: an all-gather."""
    return x if axis.size == 1 else _Shard.apply(x, axis, dim)


def all_to_all(
    x: Tensor, axis: Axis, *, send: Sequence[int], receive: Sequence[int], replay: Replay | None = None
) -> Tensor:
    """V to V: stretches of the rows of [n, m] to the ranks of the axis, `send` rows for each, and from each `receive`
    of its rows. Backward: the way back."""
    return x if axis.size == 1 else _AllToAll.apply(x, axis, send, receive, replay or Replay())
