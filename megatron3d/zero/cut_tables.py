"""Which tables stage 3 cuts into blocks of rows, and how large the blocks are. Pure arithmetic.

A rank has whole layers for a while anyway: two with their weights, three with their gradients. A block is as large as
the largest of them, so a table adds no peak of its own, however many words it has, and no collective is smaller than
those of a layer. In models so small that their layers are smaller than `SMALLEST_BLOCK` that is the size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from megatron3d.params.row_blocks import RowBlock
from megatron3d.params.spec import ParamKind, ParamSpec
from megatron3d.zero.flat import FlatLayout, flat_layout

SMALLEST_BLOCK = 1 << 14  # elements: below that a collective costs what its start costs
BLOCKS_AT_ONCE = 2  # of weights: one that is used, and the next on its way

Blocks = tuple[RowBlock, ...]


def unit_layout(specs: Sequence[ParamSpec], *, tp: int, num_ranks: int, shards_weights: bool) -> FlatLayout:
    """Where the parameters of a unit lie, as `flat_layout`; a table that some rank may cut has whole rows.

    That depends on the table alone, as the holders of a tied one sum its gradients: one of them may cut it and another
    not, having larger units beside it.
    """
    plain = flat_layout(specs, tp=tp, num_ranks=num_ranks)
    if not shards_weights or plain.table_width is None or plain.length <= SMALLEST_BLOCK:
        return plain
    return flat_layout(specs, tp=tp, num_ranks=num_ranks, whole_rows=True)


def tables_to_cut(layouts: Mapping[str, FlatLayout]) -> list[str]:
    """The units of a rank that are tables larger than any other unit; `layouts` are those of all its units."""
    largest = _largest_other(layouts)
    return [name for name, one in layouts.items() if one.table_width is not None and one.length > largest]


def cut_tables(layouts: Mapping[str, FlatLayout], num_ranks: Callable[[ParamKind], int]) -> dict[str, Blocks]:
    """The blocks of each of these units, of nearly equal size.

    Args:
        layouts: of all units of the rank, by `unit_layout`.
        num_ranks: ranks that own parts of a unit of a kind.
    """
    largest, names = _largest_other(layouts), tables_to_cut(layouts)
    return {name: _blocks(layouts[name], num_ranks(layouts[name].kind), largest) for name in names}


def _largest_other(layouts: Mapping[str, FlatLayout]) -> int:
    return max([SMALLEST_BLOCK, *(one.length for one in layouts.values() if one.table_width is None)])


def _blocks(layout: FlatLayout, num_ranks: int, largest: int) -> Blocks:
    """Blocks of `largest` elements at most, unless a row of each rank has more."""
    assert layout.table_width is not None, "a unit that is no table has no rows"
    rows = layout.length // (layout.table_width * num_ranks)
    most = max(1, largest // (layout.table_width * num_ranks))
    count = -(-rows // most)
    bounds = [rows * number // count for number in range(count + 1)]
    return tuple(RowBlock(num_ranks, rows, start, stop) for start, stop in pairwise(bounds))


def block_name(unit: str, number: int) -> str:
    """What a block of a unit is called where each has something of its own."""
    return f"{unit}#{number}"
