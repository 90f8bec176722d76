"""Mesh: the axes of a live layout are its groups, two layouts live side by side, one rank needs no process group."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron3d.comm import collectives
from megatron3d.comm.launch import Launch, read_launch
from megatron3d.comm.layout import AXES, Layout
from megatron3d.comm.mesh import Axis, Mesh, make_mesh
from megatron3d.comm.waiting import CollectiveError, is_peer_failure, is_timeout
from megatron3d.errors import ConfigError, PeerError
from tests.dist.pool import Pool

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")


def _axes(mesh: Mesh) -> list[Axis]:
    return [mesh.axis(name) for name in AXES]


def test_one_rank_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    mesh = make_mesh(Layout())
    for axis in _axes(mesh):
        assert (axis.size, axis.rank, axis.ranks, axis.group) == (1, 0, (0,), None)
        assert axis.meter is mesh.meter
    assert str(mesh) == "rank 0 of 1 (TP1 x PP1 x DP1)"


def test_a_layout_of_another_size_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="layout TP2 x PP1 x DP1 needs 2 ranks, there are 1"):
        make_mesh(Layout(tp=2))


def _members(mesh: Mesh) -> dict[str, Any]:
    """For each axis what the layout says, and what the live group gathers."""
    return {axis.name: (axis.ranks, axis.rank, collectives.gather_values(mesh.rank, axis)) for axis in _axes(mesh)}


def _two_layouts(rank: int, world_size: int, first: Layout, second: Layout) -> list[Any]:
    meshes = [make_mesh(first), make_mesh(second)]
    members = [_members(mesh) for mesh in meshes]
    sums = [float(collectives.all_reduce(torch.tensor([float(rank)]), mesh.tp)) for mesh in meshes]
    counts = [mesh.meter.read().get(("tp", "all_reduce"), (0, 0))[0] for mesh in meshes]
    return [members, sums, counts, [str(mesh) for mesh in meshes]]


def test_two_layouts_live_in_one_process_each_with_its_own_groups_and_meter(pool: Pool) -> None:
    layouts = [Layout(tp=2, pp=2, kv_copies=2), Layout(pp=2, dp=2)]
    for rank, (members, sums, counts, names) in enumerate(pool.run(4, _two_layouts, *layouts)):
        for layout, found in zip(layouts, members):
            assert set(found) == set(AXES)
            for axis in AXES:
                expected = layout.ranks_along(axis, rank)
                assert found[axis] == (expected, expected.index(rank), list(expected))
        assert sums == [float(rank // 2 * 4 + 1), float(rank)]
        assert counts == [1, 0]
        assert names[1] == f"rank {rank} of 4 (TP1 x PP2 x DP2: dp {rank % 2}, pp {rank // 2})"


def _members_and_groups(rank: int, world_size: int, layout: Layout) -> tuple[dict[str, Any], int, bool]:
    mesh = make_mesh(layout)
    groups = {id(axis.group) for axis in _axes(mesh) if axis.group is not None}
    return _members(mesh), len(groups), mesh.reports_samples


@pytest.mark.parametrize(
    ("layout", "num_groups"),
    [
        (Layout(dp=4), 3),  # all data-parallel uses share one, but gathers have their own; `world` has the default
        (Layout(cp=2, dp=2, zero_shard=2), 6),  # batch is replica; cp and gather apart from shard; grad, world
        (Layout(tp=2, cp=2, ep=4, etp=1), 6),  # tp, cp, grad, gather, expert, world: more experts than data ranks
        (Layout(tp=2, pp=2, ep=2, etp=1), 4),  # tp is expert, pp, tied, world
    ],
    ids=str,
)
def test_the_axes_of_every_use_are_live_groups_and_equal_ones_are_made_once(
    pool: Pool, layout: Layout, num_groups: int
) -> None:
    for rank, (found, made, reports) in enumerate(pool.run(4, _members_and_groups, layout)):
        for axis in AXES:
            expected = layout.ranks_along(axis, rank)
            assert found[axis] == (expected, expected.index(rank), list(expected)), axis
        assert made == num_groups
        position = layout.coordinates(rank)
        assert reports == (position["tp"] == position["cp"] == 0)


def _tied_of_three_stages(rank: int, world_size: int) -> tuple[list[int], bool]:
    mesh = make_mesh(Layout(pp=3))
    return collectives.gather_values(rank, mesh.tied), mesh.tied.group is None


def test_middle_stages_hold_no_tied_table_and_have_no_group_for_it(pool: Pool) -> None:
    assert pool.run(3, _tied_of_three_stages) == [([0, 2], False), ([1], True), ([0, 2], False)]


def _wait_for_a_late_peer(rank: int, world_size: int) -> bool:
    mesh = make_mesh(Layout(dp=2), timeout=timedelta(seconds=0.5))
    if rank == 1:
        time.sleep(1.0)
        return True
    try:
        collectives.all_reduce(torch.ones(1), mesh.grad)
    except CollectiveError as error:
        cause = error.__cause__
        return is_peer_failure(error) and cause is not None and is_timeout(cause) and "grad (ranks 0, 1)" in str(error)
    return False


def test_a_collective_gives_up_on_a_late_peer_and_that_counts_as_its_failure(pool: Pool) -> None:
    assert pool.run(2, _wait_for_a_late_peer) == [True, True]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PeerError("rank 3 is gone"), True),
        (dist.DistNetworkError("the connection was refused"), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("Timed out waiting 1000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
        (ConfigError("--tensor-model-parallel-size 3"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_peer_failures_are_told_from_other_errors(error: BaseException, expected: bool) -> None:
    assert is_peer_failure(error) is expected


def test_torchrun_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCH_VARIABLES, ("5", "8", "1", "4", "2")):
        monkeypatch.setenv(name, value)
    expected = Launch(rank=5, world_size=8, local_rank=1, local_world_size=4, restart_count=2)
    assert read_launch() == expected


def test_without_torchrun_a_process_is_rank_zero_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert read_launch() == Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, restart_count=0)
