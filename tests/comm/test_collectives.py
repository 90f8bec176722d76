"""Plain collectives against sums and concatenations in one process, and the meter against the formulas of a ring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron3d.comm import collectives
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.comm.meter import Meter, wire_bytes
from megatron3d.comm.p2p import Message, start_exchange
from tests.dist.pool import Pool

FLOAT_BYTES = 4


def _of(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def _check_collectives(rank: int, world_size: int) -> None:
    axis = make_mesh(Layout(dp=world_size)).grad
    every = [_of(r, 8, 4, 12) for r in range(world_size)]
    stacked = torch.stack(every)
    mine = every[rank]
    torch.testing.assert_close(collectives.all_reduce(mine.clone(), axis), stacked.sum(0))
    assert torch.equal(collectives.all_reduce(mine.clone(), axis, reduction="max"), stacked.amax(0))
    assert torch.equal(collectives.all_reduce(mine.clone(), axis, reduction="min"), stacked.amin(0))
    several = [torch.full((n,), float(mine[0, 0, 0])) for n in (3, collectives.LARGEST_TOGETHER, 1)]
    collectives.all_reduce_together(several, axis)
    for one in several:
        torch.testing.assert_close(one, stacked[:, 0, 0, 0].sum().expand(len(one)))
    for dim in (0, 1, 2, -1):
        assert torch.equal(collectives.all_gather(mine, axis, dim=dim), torch.cat(every, dim))
        part = stacked.sum(0).chunk(world_size, dim)[rank]
        torch.testing.assert_close(collectives.reduce_scatter(mine, axis, dim=dim), part)
        assert torch.equal(collectives.own_part(mine, axis, dim=dim), mine.chunk(world_size, dim)[rank])
    for source in range(world_size):
        assert torch.equal(collectives.broadcast(mine.clone(), axis, source=source), every[source])
    assert collectives.gather_values({"rank": rank}, axis) == [{"rank": r} for r in range(world_size)]
    collectives.barrier(axis)


@pytest.mark.parametrize("world_size", [2, 4])
def test_collectives_equal_sums_and_concatenations(pool: Pool, world_size: int) -> None:
    pool.run(world_size, _check_collectives)


def _gather_in_place(rank: int, world_size: int) -> list[float]:
    axis = make_mesh(Layout(dp=world_size)).grad
    whole = torch.zeros(2 * world_size)
    part = whole[2 * rank : 2 * rank + 2].fill_(rank + 1.0)
    assert collectives.start_all_gather_into(whole, part, axis).wait() is whole
    return whole.tolist()


def test_gathering_into_the_buffer_that_holds_the_own_part_fills_the_others(pool: Pool) -> None:
    assert pool.run(3, _gather_in_place) == [[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]] * 3


def _dropped(rank: int, world_size: int) -> None:
    """Gathers and sums of several sizes on axes with the same ranks, of which every second is dropped at once."""
    mesh = make_mesh(Layout(dp=world_size))
    axes, sizes = [mesh.grad, mesh.shard, mesh.grad, mesh.batch], [3, 1000, 1, 70_000]
    under_way = []
    for number, (axis, size) in enumerate(zip(axes * 2, sizes * 2, strict=True)):
        parts = torch.stack([_of(100 * number + r, world_size, size) for r in range(world_size)])
        gathering = collectives.start_all_gather(parts[rank], axis)
        summing = collectives.start_reduce_scatter(parts[rank], axis)
        if number % 2:
            under_way += [(gathering, parts.flatten(0, 1)), (summing, parts.sum(0)[rank : rank + 1])]
        del gathering, summing
    for pending, expected in reversed(under_way):
        torch.testing.assert_close(pending.wait(), expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_that_nobody_waits_for_leave_the_results_of_others_alone(pool: Pool, world_size: int) -> None:
    pool.run(world_size, _dropped)


def _sum_of_bf16(rank: int, world_size: int) -> None:
    axis = make_mesh(Layout(dp=world_size)).grad
    parts = torch.stack([_of(r, 2 * world_size, 50) for r in range(world_size)]).bfloat16()
    found = collectives.reduce_scatter(parts[rank], axis)
    assert torch.equal(found, parts.double().sum(0).bfloat16()[2 * rank : 2 * rank + 2])


def test_a_reduce_scatter_of_bf16_rounds_each_sum_once(pool: Pool) -> None:
    pool.run(4, _sum_of_bf16)


def _counts(rank: int, world_size: int) -> tuple[dict[tuple[str, str], tuple[int, int]], bool]:
    mesh = make_mesh(Layout(tp=2, dp=2))
    x = torch.zeros(4, 6)
    collectives.all_reduce(x, mesh.tp)
    collectives.all_reduce(x.to(torch.bfloat16), mesh.tp)
    collectives.all_gather(x, mesh.grad, dim=1)
    collectives.reduce_scatter(x, mesh.grad)
    collectives.all_reduce(x, mesh.pp)  # one rank: nothing to count
    collectives.broadcast(x, mesh.world)
    peer = 1 - mesh.tp.rank
    received = torch.empty(5)
    sent = torch.full((5,), float(rank))
    messages = [Message(sent, sends=True, peer=peer, tag=7), Message(received, sends=False, peer=peer, tag=7)]
    for one in start_exchange(messages, mesh.tp):
        one.wait()
    assert received.tolist() == [float(mesh.tp.ranks[peer])] * 5
    counted = mesh.meter.read()
    mesh.meter.reset()
    return counted, mesh.meter.read() == {}


def test_the_meter_counts_calls_and_the_bytes_of_the_whole_tensor_of_each(pool: Pool) -> None:
    expected = {
        ("tp", "all_reduce"): (2, 4 * 6 * FLOAT_BYTES + 4 * 6 * 2),
        ("grad", "all_gather"): (1, 4 * 12 * FLOAT_BYTES),
        ("grad", "reduce_scatter"): (1, 4 * 6 * FLOAT_BYTES),
        ("world", "broadcast"): (1, 4 * 6 * FLOAT_BYTES),
        ("tp", "send"): (1, 5 * FLOAT_BYTES),
        ("tp", "receive"): (1, 5 * FLOAT_BYTES),
    }
    assert pool.run(4, _counts) == [(expected, True)] * 4


def test_on_an_axis_of_one_rank_nothing_is_copied_or_counted() -> None:
    mesh = make_mesh(Layout())
    x = torch.randn(3, 4)
    for call in (collectives.all_reduce, collectives.all_gather, collectives.reduce_scatter, collectives.own_part):
        assert call(x, mesh.tp) is x
    for start in (collectives.start_all_reduce, collectives.start_all_gather, collectives.start_reduce_scatter):
        pending = start(x, mesh.grad)
        assert pending.is_done() and pending.wait() is x
    assert collectives.broadcast(x, mesh.tp) is x
    assert collectives.gather_values("value", mesh.tp) == ["value"]
    collectives.barrier(mesh.world)
    elsewhere = torch.zeros(3)
    collectives.start_all_gather_into(elsewhere, x[:, 0].contiguous(), mesh.grad).wait()
    assert torch.equal(elsewhere, x[:, 0])
    assert mesh.meter.read() == {}


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_wire_bytes_are_what_a_simulated_ring_sends(num_ranks: int) -> None:
    """A ring passes one n-th of the tensor on in each of its n - 1 rounds; an all-reduce goes around twice."""
    payload = 24 * 1024
    sent = sum(payload / num_ranks for _ in range(num_ranks - 1))
    assert wire_bytes("all_gather", payload, num_ranks) == pytest.approx(sent)
    assert wire_bytes("reduce_scatter", payload, num_ranks) == pytest.approx(sent)
    assert wire_bytes("all_reduce", payload, num_ranks) == pytest.approx(2 * sent)
    assert wire_bytes("all_to_all", payload, num_ranks) == pytest.approx(sent)  # one stretch to each other rank
    assert wire_bytes("send", payload, num_ranks) == payload


def test_a_meter_adds_up_by_axis_and_collective() -> None:
    meter = Meter()
    calls: list[Any] = [("tp", "all_reduce", 3), ("tp", "all_reduce", 4), ("dp", "all_reduce", 5)]
    for call in calls:
        meter.add(*call)
    assert meter.read() == {("tp", "all_reduce"): (2, 7), ("dp", "all_reduce"): (1, 5)}
