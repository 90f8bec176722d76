"""Process groups of a large job: one call for each kind of groups, counted on process groups that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron3d.comm.collectives import all_gather, all_reduce, count_votes, start_reduce_scatter
from megatron3d.comm.layout import AXES, Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from tests.dist.pool import Pool

LARGE = {1024: Layout(tp=8, pp=8, dp=16), 16_384: Layout(tp=8, pp=16, dp=128)}
TIMEOUT = timedelta(minutes=3)
RANK = 5


@contextmanager
def fake_job(world_size: int) -> Iterator[None]:
    """This process as one rank of a job without others."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "layout"), LARGE.items(), ids=str)
@pytest.mark.parametrize("on_gpus", [False, True])
def test_a_rank_makes_one_group_a_partition_at_any_number_of_ranks(
    world_size: int, layout: Layout, on_gpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tp, pp, grad, gather and tied, and three of the host; `world` is the group in which the ranks met."""
    new_group, calls = dist.new_group, []

    def made(ranks: list[int], *, backend: str | None = None, **options: Any) -> Any:
        calls.append((backend, ranks))
        assert options["timeout"] == TIMEOUT
        return new_group(ranks, **options)

    def split(*, split_ranks: list[list[int]], timeout: timedelta) -> Any:
        """Torch's own needs NCCL. Every rank is in exactly one group."""
        assert sorted(rank for group in split_ranks for rank in group) == list(range(world_size))
        own = next(group for group in split_ranks if RANK in group)
        calls.append(("split", own))
        return new_group(own, timeout=timeout, use_local_synchronization=True)

    monkeypatch.setattr(dist, "new_group", made)
    monkeypatch.setattr(dist, "split_group", split)
    with fake_job(world_size):
        if on_gpus:
            assert dist.group.WORLD is not None
            dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
        mesh = make_mesh(layout, timeout=TIMEOUT)
        assert mesh.world.group is dist.group.WORLD
        on_device = [ranks for backend, ranks in calls if backend == ("split" if on_gpus else None)]
        on_host = [ranks for backend, ranks in calls if backend == "gloo"]
        kinds = ("tp", "pp", "batch", "gather", "tied")
        assert on_device == [list(mesh.axis(name).ranks) if RANK in mesh.axis(name).ranks else [RANK] for name in kinds]
        assert on_host == [list(mesh.axis(name).ranks) for name in ("tp", "batch", "pp")]
        for name in AXES:
            axis = mesh.axis(name)
            assert (axis.group is None) == (axis.size == 1)
            assert axis.group is None or dist.get_process_group_ranks(axis.group) == list(axis.ranks)


def _host_sums(rank: int, world_size: int, layout: Layout) -> tuple[int, int, float, bool]:
    mesh = make_mesh(layout)
    total = torch.tensor(10.0**rank)
    for axis in mesh.host:
        total = all_reduce(total, axis)
    return count_votes(rank % 2 == 1, mesh.host), count_votes(False, mesh.host), float(total), _shares(mesh)


def _shares(mesh: Mesh) -> bool:
    """Whether the axes of the host use groups that there are anyway."""
    return mesh.host == (mesh.tp, mesh.cp, mesh.batch, mesh.pp) and mesh.host_batch is mesh.batch


@pytest.mark.parametrize("layout", [Layout(tp=2, dp=2), Layout(pp=2, cp=2), Layout(dp=4), Layout(pp=4)], ids=str)
def test_a_sum_along_the_axes_of_the_host_counts_every_rank_once(pool: Pool, layout: Layout) -> None:
    assert pool.run(4, _host_sums, layout) == [(2, 0, 1111.0, True)] * 4


def _uneven(rank: int, world_size: int) -> list[float]:
    """Groups after one that the middle ranks are not in, and of a second layout."""
    sums = []
    for layout in (Layout(pp=3), Layout(dp=3), Layout(pp=3)):
        mesh = make_mesh(layout)
        for axis in (mesh.tied, mesh.gather, mesh.pp):
            sums.append(float(all_reduce(torch.tensor([float(rank + 1)]), axis)))
    return sums


def test_ranks_that_are_in_fewer_groups_still_meet_in_those_made_later(pool: Pool) -> None:
    for rank, sums in enumerate(pool.run(3, _uneven)):
        tied = 2.0 if rank == 1 else 4.0
        assert sums == [tied, rank + 1.0, 6.0, rank + 1.0, 6.0, rank + 1.0, tied, rank + 1.0, 6.0]


def _gather_beside_a_reduction(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """Rank 0 starts a reduction and gathers; the other comes to the reduction only after that gather."""
    mesh = make_mesh(Layout(dp=world_size))
    gradients, weights = torch.arange(2.0) + rank, torch.tensor([float(rank)])
    reduction = start_reduce_scatter(gradients, mesh.shard) if rank == 0 else None
    gathered = all_gather(weights, mesh.gather)
    reduction = reduction or start_reduce_scatter(gradients, mesh.shard)
    return gathered.tolist(), reduction.wait().tolist()


def test_a_gather_of_weights_passes_a_reduction_that_has_not_ended(pool: Pool) -> None:
    assert pool.run(2, _gather_beside_a_reduction) == [([0.0, 1.0], [1.0]), ([0.0, 1.0], [3.0])]
