"""Blocks of a table: every row is in one of them, none is larger than a layer, and small tables stay whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.params.row_blocks import RowBlock
from megatron3d.params.spec import Init, ParamSpec
from megatron3d.zero.cut_tables import SMALLEST_BLOCK, cut_tables, tables_to_cut
from megatron3d.zero.flat import FlatLayout, flat_layout


def table(rows: int, width: int, num_ranks: int, *, whole_rows: bool = True) -> FlatLayout:
    spec = ParamSpec("word", (rows, width), Init("zeros"), decays=True, tp_dim=0, is_table=True)
    return flat_layout([spec], tp=1, num_ranks=num_ranks, whole_rows=whole_rows)


def layer(length: int) -> FlatLayout:
    spec = ParamSpec("layer", (length, 1), Init("zeros"), decays=True)
    return flat_layout([spec], tp=1, num_ranks=1)


@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 200).map(lambda n: 8 * n),
    num_ranks=st.integers(1, 9),
    of_layer=st.integers(1, 1 << 17),
)
def test_blocks_hold_every_row_once_and_are_no_larger_than_a_layer(
    rows: int, width: int, num_ranks: int, of_layer: int
) -> None:
    layouts = {"table": table(rows, width, num_ranks), "layer": layer(of_layer)}
    largest = max(SMALLEST_BLOCK, layouts["layer"].length)
    found = cut_tables(layouts, lambda kind: num_ranks)
    assert list(found) == tables_to_cut(layouts) == (["table"] if layouts["table"].length > largest else [])
    for blocks in found.values():
        every = torch.arange(blocks[0].num_ranks * blocks[0].rows_per_rank)
        held = torch.cat([block.columns_of(every).flatten() for block in blocks])
        assert torch.equal(held.sort().values, every) and len(every) * width == layouts["table"].length >= rows * width
        assert all(block.num_rows * width <= max(largest, num_ranks * width) for block in blocks)
        assert max(block.num_rows for block in blocks) - min(block.num_rows for block in blocks) <= num_ranks


@given(num_ranks=st.integers(1, 5), of_each=st.integers(1, 40), data=st.data())
def test_a_row_is_found_in_the_block_that_has_its_column_and_nowhere_else(
    num_ranks: int, of_each: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, of_each - 1))
    block = RowBlock(num_ranks, of_each, start, data.draw(st.integers(start + 1, of_each)))
    every = torch.arange(num_ranks * of_each)
    columns = block.columns_of(every).flatten()
    position, elsewhere = block.positions(every)
    assert torch.equal(every[~elsewhere], columns) and torch.equal(columns[position[~elsewhere]], every[~elsewhere])
    assert bool(((position >= 0) & (position < block.num_rows)).all())


def test_every_rank_owns_whole_rows_of_a_table_that_is_cut() -> None:
    for num_ranks in (1, 3, 8):
        whole, plain = (table(1029, 20, num_ranks, whole_rows=whole) for whole in (True, False))
        assert whole.slice_of(0, num_ranks).length % 20 == 0 and plain.slice_of(0, num_ranks).length % 32 == 0
        assert plain.length <= whole.length < plain.length + num_ranks * 160
