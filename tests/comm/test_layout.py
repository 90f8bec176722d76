"""Layout: rank numbers are mixed-radix numbers, and the groups of every axis are those of plain enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron3d.comm.layout import AXES, EXPERT_GRID, GRID, Layout
from megatron3d.errors import ConfigError

# Uses whose groups are all ranks that differ along some coordinates of (pp, dp, cp, tp), or of (pp, edp, ep, etp).
LINES = {"pp": [0], "batch": [1], "grad": [1, 2], "cp": [2], "tp": [3], "world": [0, 1, 2, 3]}
EXPERT_LINES = {"expert_grad": [1], "expert": [2], "expert_tp": [3]}


def divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout of up to 192 ranks whose degrees fit together."""
    tp, pp, dp, cp = (draw(st.integers(1, most)) for most in (4, 3, 4, 4))
    etp = draw(st.sampled_from(divisors(tp * cp * dp)))
    ep = draw(st.sampled_from(divisors(tp * cp * dp // etp)))
    shard, copies = draw(st.sampled_from([None, *divisors(dp * cp)])), draw(st.sampled_from(divisors(tp)))
    cp_heads = draw(st.sampled_from(divisors(cp)))
    block, each = tp * (shard or dp * cp), etp * ep
    assume(block % each == 0 or each % block == 0)
    return Layout(tp, pp, dp, cp, ep, etp, shard, copies, cp_heads)


def grid_of(layout: Layout) -> np.ndarray:
    """Every rank at its position (pp, dp, cp, tp)."""
    return np.arange(layout.world_size).reshape(layout.pp, layout.dp, layout.cp, layout.tp)


def expert_grid_of(layout: Layout) -> np.ndarray:
    """Every rank at its position (pp, edp, ep, etp)."""
    return np.arange(layout.world_size).reshape(layout.pp, -1, layout.ep, layout.etp or layout.tp)


def lines(grid: np.ndarray, dims: list[int]) -> list[tuple[int, ...]]:
    """The ranks that differ along these dimensions alone, the last fastest, for every position along the others."""
    last_dims = np.moveaxis(grid, dims, range(grid.ndim - len(dims), grid.ndim))
    size = int(np.prod([grid.shape[dim] for dim in dims]))
    return sorted(tuple(map(int, line)) for line in last_dims.reshape(-1, size))


def by_block(groups: list[tuple[int, ...]], size: int) -> list[tuple[int, ...]]:
    """Each group cut into blocks of consecutive ranks: [0, size), [size, 2 size), and so on."""
    blocks = [
        [tuple(r for r in group if r // size == b) for b in sorted({r // size for r in group})] for group in groups
    ]
    return sorted(block for cut in blocks for block in cut)


def across(groups: list[tuple[int, ...]], parts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The ranks of a group that have the same position in the parts that it is cut into."""
    position = {rank: part.index(rank) for part in parts for rank in part}
    return sorted(
        {tuple(other for other in group if position[other] == position[rank]) for group in groups for rank in group}
    )


def enumerated(layout: Layout) -> dict[str, list[tuple[int, ...]]]:
    """The groups of every axis by enumeration."""
    groups = {name: lines(grid_of(layout), dims) for name, dims in LINES.items()}
    groups |= {name: lines(expert_grid_of(layout), dims) for name, dims in EXPERT_LINES.items()}
    # A block of consecutive ranks shards each parameter once, dense ones and those of experts.
    block = layout.tp * (layout.zero_shard or layout.dp * layout.cp)
    for cut, kind in (("", "grad"), ("expert_", "expert_grad")):
        groups[f"{cut}shard"] = groups[f"{cut}gather"] = by_block(groups[kind], block)
        groups[f"{cut}replica"] = across(groups[kind], groups[f"{cut}shard"])
    groups["kv"] = by_block(groups["tp"], layout.kv_copies)
    groups["cp_heads"] = by_block(groups["cp"], layout.tp * layout.cp_heads)
    groups["cp_ring"] = across(groups["cp"], groups["cp_heads"])
    ends = [tuple(dict.fromkeys((line[0], line[-1]))) for line in groups["pp"]]
    groups["tied"] = sorted(ends + [(rank,) for line in groups["pp"] for rank in line[1:-1]])
    return groups


@given(layouts())
def test_the_groups_of_every_axis_are_those_of_plain_enumeration(layout: Layout) -> None:
    expected = enumerated(layout)
    assert set(expected) == set(AXES)
    for name, groups in expected.items():
        assert layout.groups(name) == groups, name
        assert layout.size(name) == max(map(len, groups)), name
        for group in groups:
            assert all(layout.ranks_along(name, rank) == group for rank in group), name


@given(layouts())
def test_ranks_count_through_the_positions_of_both_grids_with_the_tensor_axis_fastest(layout: Layout) -> None:
    for grid, ranks in ((GRID, grid_of(layout)), (EXPERT_GRID, expert_grid_of(layout))):
        for position, rank in np.ndenumerate(ranks):
            by_name = dict(zip(reversed(grid), position, strict=True))
            assert layout.coordinates(int(rank), grid) == by_name
            assert layout.rank_at(grid, **by_name) == rank


@given(layouts())
def test_the_ranks_of_a_stage_hold_all_experts_as_often_as_expert_gradients_have_summands(layout: Layout) -> None:
    """ETP x EP x EDP = TP x CP x DP, and every rank that sums an expert's gradient holds the same part of it."""
    assert layout.size("expert_tp") * layout.size("expert") * layout.size("expert_grad") == layout.tp * layout.grad_size
    for group in layout.groups("expert_grad"):
        held = {tuple(layout.coordinates(rank, EXPERT_GRID)[name] for name in ("etp", "ep", "pp")) for rank in group}
        assert len(held) == 1


def test_groups_of_sixteen_ranks_are_those_that_megatron_prints() -> None:
    """Source: the example of 16 GPUs with tensor size 2 and pipeline size 4 in Megatron-LM's parallel_state."""
    layout = Layout(tp=2, pp=4, dp=2)
    assert layout.groups("tp") == [(rank, rank + 1) for rank in range(0, 16, 2)]
    assert layout.groups("grad") == [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15)]
    assert layout.groups("pp") == [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]


def test_experts_may_be_cut_over_more_ranks_than_the_data_axis_has() -> None:
    """TP2 x CP2 x DP1 with four experts whole on a rank each: expert parallelism over tensor and context ranks."""
    layout = Layout(tp=2, cp=2, ep=4, etp=1)
    assert layout.groups("expert") == [(0, 1, 2, 3)] and layout.groups("expert_tp") == [(0,), (1,), (2,), (3,)]
    assert layout.groups("expert_grad") == [(0,), (1,), (2,), (3,)]
    assert layout.groups("grad") == [(0, 2), (1, 3)] and layout.groups("batch") == [(0,), (1,), (2,), (3,)]


def test_positions_left_out_are_zero() -> None:
    assert Layout(tp=2, pp=2, dp=3).rank_at(pp=1) == 6


@pytest.mark.parametrize("degree", ["tp", "pp", "dp", "cp", "ep", "etp"])
def test_a_degree_under_one_is_refused_by_name(degree: str) -> None:
    with pytest.raises(ConfigError, match=rf"the {degree} degree of a layout must be at least 1, not 0"):
        Layout(**{degree: 0})


def test_a_layout_prints_the_degrees_in_use() -> None:
    assert str(Layout(tp=2, pp=4, dp=8)) == "TP2 x PP4 x DP8"
    assert str(Layout(tp=2, cp=2, ep=4, etp=1)) == "TP2 x PP1 x DP1 x CP2 x EP4 x ETP1"


@pytest.mark.parametrize("size", [0, 3, 8])
def test_a_shard_size_that_cuts_unevenly_is_refused_with_both_numbers(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"--zero-shard-size {size} does not cut the 4 data-parallel ranks"):
        Layout(dp=4, zero_shard=size)


def test_experts_that_do_not_fit_on_the_ranks_of_a_stage_are_refused_with_both_products() -> None:
    with pytest.raises(ConfigError, match=r"expert tensor 2 x expert 3 = 6 does not divide .* data 2 = 4 ranks"):
        Layout(tp=2, dp=2, ep=3)
    with pytest.raises(ConfigError, match=r"--zero-shard-size 3 x tensor 1 = 3 consecutive ranks are no whole number"):
        Layout(dp=6, ep=2, zero_shard=3)
    with pytest.raises(ConfigError, match="3 copies of each key and value head do not fit on 4 tensor-parallel ranks"):
        Layout(tp=4, kv_copies=3)


def test_groups_that_exchange_heads_and_cut_the_context_ranks_unevenly_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 ranks that exchange heads do not divide 4 context-parallel ranks"):
        Layout(cp=4, cp_heads=3)
