"""Every typed collective, forward and backward, against one process that holds everything.

The reference is the global function: `whole` gives the result from what all ranks hold, and autograd differentiates
the sum of all ranks' losses (or the one loss they share, where the result is invariant). What a rank must find as the
gradient of its input then follows from the input's type: I the gradient of the one tensor, V of its own shard, P (a sum
over the ranks) the gradient of its own summand, which is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron3d.comm import typed
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Axis, make_mesh
from tests.dist.pool import Pool

LOCAL = (2, 3, 4)  # shape of one shard
Held = list[Tensor]  # one tensor for each rank of the axis


@dataclass(frozen=True)
class Case:
    """A collective with its types; `whole` computes from the inputs of all ranks the outputs of all ranks."""

    name: str
    src: str
    dst: str
    call: Callable[[Tensor, Axis, int], Tensor]
    whole: Callable[[Held, int], Held]


def _sum_everywhere(held: Held, dim: int) -> Held:
    return [sum(held[1:], held[0])] * len(held)


def _side_by_side(held: Held, dim: int) -> Held:
    return [torch.cat(held, dim)] * len(held)


def _parts_of_sum(held: Held, dim: int) -> Held:
    return list(sum(held[1:], held[0]).split(LOCAL[dim], dim))


def _parts(held: Held, dim: int) -> Held:
    return list(held[0].split(LOCAL[dim], dim))


CASES = [
    Case("all_reduce", "P", "I", lambda x, axis, dim: typed.all_reduce(x, axis, dst="I"), _sum_everywhere),
    Case("all_reduce", "P", "R", lambda x, axis, dim: typed.all_reduce(x, axis, dst="R"), _sum_everywhere),
    Case("replicate", "I", "R", lambda x, axis, dim: typed.replicate(x, axis), lambda held, dim: held),
    Case("all_gather", "V", "I", lambda x, axis, dim: typed.all_gather(x, axis, dst="I", dim=dim), _side_by_side),
    Case("all_gather", "V", "R", lambda x, axis, dim: typed.all_gather(x, axis, dst="R", dim=dim), _side_by_side),
    Case("reduce_scatter", "P", "V", lambda x, axis, dim: typed.reduce_scatter(x, axis, dim=dim), _parts_of_sum),
    Case("shard", "I", "V", lambda x, axis, dim: typed.shard(x, axis, dim=dim), _parts),
]


def _inputs(case: Case, size: int, dim: int) -> Held:
    """What each rank holds: one tensor shared by all for I, its own for V and P."""
    shape = list(LOCAL)
    if case.dst == "V":
        shape[dim] *= size
    generator = torch.Generator().manual_seed(1)
    held = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(size)]
    return [held[0]] * size if case.src == "I" else held


def _loss(y: Tensor, rank: int, dst: str) -> Tensor:
    """A loss that is nonlinear and, but for an invariant result, another one on each rank."""
    generator = torch.Generator().manual_seed(0 if dst == "I" else 10 + rank)
    return (torch.randn(y.shape, generator=generator, dtype=torch.float64) * y**3).sum()


def _expected(case: Case, size: int, dim: int) -> tuple[Held, Held]:
    """Outputs and input gradients of every rank, by one process."""
    leaves = [x.clone().requires_grad_() for x in _inputs(case, size, dim)]
    if case.src == "I":
        leaves = leaves[:1] * size
    outputs = case.whole(leaves, dim)
    losses = [_loss(y, rank, case.dst) for rank, y in enumerate(outputs)]
    total = losses[0] if case.dst == "I" else torch.stack(losses).sum()
    return [y.detach() for y in outputs], list(torch.autograd.grad(total, leaves))


def _check_all(rank: int, world_size: int, layout: Layout, axis_name: str) -> None:
    mesh = make_mesh(layout)
    axis = {"tp": mesh.tp, "grad": mesh.grad}[axis_name]
    for case in CASES:
        for dim in (0, 1, -1):
            x = _inputs(case, axis.size, dim)[axis.rank].clone().requires_grad_()
            y = case.call(x, axis, dim)
            _loss(y, axis.rank, case.dst).backward()
            outputs, grads = _expected(case, axis.size, dim)
            where = f"{case.name} {case.src} to {case.dst} along dim {dim} on {mesh}"
            torch.testing.assert_close(y, outputs[axis.rank], msg=lambda text, where=where: f"{where}: {text}")
            torch.testing.assert_close(x.grad, grads[axis.rank], msg=lambda text, where=where: f"{where} grad: {text}")


@pytest.mark.parametrize(
    ("layout", "axis"),
    [(Layout(tp=2), "tp"), (Layout(tp=3), "tp"), (Layout(tp=4), "tp"), (Layout(tp=2, dp=2), "grad")],
    ids=str,
)
def test_forward_and_backward_equal_the_global_function(pool: Pool, layout: Layout, axis: str) -> None:
    pool.run(layout.world_size, _check_all, layout, axis)


def _inputs_kept(rank: int, world_size: int) -> None:
    axis = make_mesh(Layout(tp=world_size)).tp
    for case in CASES:
        strided = torch.randn(4, 3, 4, dtype=torch.float64).transpose(0, 2)  # not contiguous
        before = strided.clone()
        x = strided.requires_grad_()
        y = case.call(x, axis, 2)
        grad = torch.ones((), dtype=torch.float64).expand(y.shape)  # what the backward of a sum hands on: stride 0
        y.backward(grad)
        assert torch.equal(x.detach(), before), f"{case.name} overwrote its input"
        assert torch.equal(grad, torch.ones_like(grad)), f"{case.name} overwrote its output's gradient"


def test_inputs_and_gradients_of_any_strides_are_taken_and_not_overwritten(pool: Pool) -> None:
    pool.run(2, _inputs_kept)


def test_on_an_axis_of_one_rank_every_collective_is_the_tensor_itself() -> None:
    axis = make_mesh(Layout()).tp
    x = torch.randn(LOCAL, requires_grad=True)
    assert all(case.call(x, axis, 1) is x for case in CASES)
