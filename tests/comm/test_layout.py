"""Layout: rank numbers are a mixed-radix number with the tensor axis as its lowest digit, as in Megatron-LM."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.comm.layout import AXES, Layout
from megatron3d.errors import ConfigError

LAYOUTS = st.builds(Layout, tp=st.integers(1, 4), pp=st.integers(1, 4), dp=st.integers(1, 4), cp=st.integers(1, 3))


def positions(layout: Layout) -> list[dict[str, int]]:
    """Every position in the order of its rank: pipeline slowest, then data, context, tensor."""
    sizes = (layout.pp, layout.dp, layout.cp, layout.tp)
    return [dict(zip(("pp", "dp", "cp", "tp"), at)) for at in product(*map(range, sizes))]


@given(LAYOUTS)
def test_ranks_count_through_the_positions_with_tensor_fastest_and_pipeline_slowest(layout: Layout) -> None:
    assert layout.world_size == len(positions(layout))
    for rank, position in enumerate(positions(layout)):
        assert layout.coordinates(rank) == position
        assert layout.rank_at(**position) == rank


@given(LAYOUTS, st.sampled_from(AXES))
def test_the_groups_of_an_axis_hold_each_rank_once_and_differ_along_that_axis_alone(layout: Layout, axis: str) -> None:
    groups = layout.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        assert [layout.coordinates(rank)[axis] for rank in group] == list(range(layout.size(axis)))
        others = [{**layout.coordinates(rank), axis: 0} for rank in group]
        assert all(other == others[0] for other in others)
        assert all(layout.ranks_along(axis, rank) == group for rank in group)


@given(LAYOUTS)
def test_tied_groups_join_the_ends_of_each_pipeline_and_hold_each_rank_once(layout: Layout) -> None:
    groups = layout.tied_groups()
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        stages = [layout.coordinates(rank)["pp"] for rank in group]
        at_an_end = layout.pp > 1 and stages[0] in (0, layout.pp - 1)
        assert stages == [0, layout.pp - 1] if at_an_end else len(stages) == 1
        assert len({tuple({**layout.coordinates(rank), "pp": 0}.items()) for rank in group}) == 1


def test_groups_of_sixteen_ranks_are_those_that_megatron_prints() -> None:
    """Source: the example of 16 GPUs with tensor size 2 and pipeline size 4 in Megatron-LM's parallel_state."""
    layout = Layout(tp=2, pp=4, dp=2)
    assert layout.groups("tp") == [(rank, rank + 1) for rank in range(0, 16, 2)]
    assert layout.groups("dp") == [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15)]
    assert layout.groups("pp") == [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]


def test_positions_left_out_are_zero() -> None:
    assert Layout(tp=2, pp=2, dp=3).rank_at(pp=1) == 6


@pytest.mark.parametrize("axis", ["tp", "pp", "dp", "cp", "ep"])
def test_a_degree_under_one_is_refused_by_name(axis: str) -> None:
    with pytest.raises(ConfigError, match=rf"the {axis} degree of a layout must be at least 1, not 0"):
        Layout(**{axis: 0})


def test_a_layout_prints_the_degrees_in_use() -> None:
    assert str(Layout(tp=2, pp=4, dp=8)) == "TP2 x PP4 x DP8"
    assert str(Layout(cp=2, ep=4)) == "TP1 x PP1 x DP1 x CP2 x EP4"


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_shard_and_replica_groups_cut_the_data_ranks_into_rows_and_columns(tp: int, pp: int, k: int, n: int) -> None:
    layout = Layout(tp=tp, pp=pp, dp=k * n, zero_shard=k)
    shards, replicas = layout.shard_groups(), layout.replica_groups()
    for groups, size in ((shards, k), (replicas, n)):
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {size}
    for group in shards:
        positions = [layout.coordinates(rank)["dp"] for rank in group]
        assert positions == list(range(positions[0], positions[0] + k)) and positions[0] % k == 0
    for row in shards:
        for column in replicas:
            assert len(set(row) & set(column)) <= 1
    whole = Layout(tp=tp, pp=pp, dp=k * n)
    assert whole.shard_groups() == whole.groups("dp") and whole.shard_size == k * n


@pytest.mark.parametrize("size", [0, 3, 8])
def test_a_shard_size_that_cuts_unevenly_is_refused_with_both_numbers(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"--zero-shard-size {size} does not cut the 4 data-parallel ranks"):
        Layout(dp=4, zero_shard=size)
