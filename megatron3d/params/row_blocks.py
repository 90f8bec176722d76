"""Row blocks: a table of the vocabulary that is too large to be whole on a rank, one block of its rows at a time.

Where the ranks of an axis each own an equal range of a table's rows, a block is the same short range of each of these:
its weights are gathered from every rank's part and its gradients are scattered to every rank's part, while who owns a
row stays as it is.

    rows       0 . . . . . . . | . . . . . . . . | . . . . . . . .      three ranks, eight rows each
    block 0    x x x           | x x x           | x x x                rows 0 to 2 of each rank
    block 1          x x x     |       x x x     |       x x x
    block 2                x x |             x x |             x x

Shapes: T tokens, H hidden, R rows of the table, N rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class RowBlock:
    """The rows [start, stop) of each of the `num_ranks` ranges, of `rows_per_rank` rows each, that make up a table."""

    num_ranks: int
    rows_per_rank: int
    start: int
    stop: int

    @property
    def rows_of_each(self) -> int:
        """Rows that each rank owns of the block."""
        return self.stop - self.start

    @property
    def num_rows(self) -> int:
        """Rows of the block, N."""
        return self.num_ranks * self.rows_of_each

    def positions(self, rows_T: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the block the rows of the table lie, int64 [T]; and whether they are not in it, bool [T]: then the
        position is some other row's, not always the same one, which would make many additions to one row."""
        rank_T, within_T = rows_T // self.rows_per_rank, rows_T % self.rows_per_rank
        elsewhere_T = (within_T < self.start) | (within_T >= self.stop)
        position_T = rank_T * self.rows_of_each + within_T - self.start
        return position_T.remainder(self.num_rows), elsewhere_T

    def columns_of(self, x_TR: Tensor) -> Tensor:
        """A view [..., num_ranks, rows of each] of the columns of [..., R] that belong to the rows of the block."""
        return x_TR.unflatten(-1, (self.num_ranks, self.rows_per_rank))[..., self.start : self.stop]


class BlockedTable(Protocol):
    """The weights of a table that come block by block."""

    @property
    def num_rows(self) -> int:
        """Rows of all blocks together, R."""
        ...

    def weights(self) -> Iterator[tuple[RowBlock, Tensor]]:
        """Every block with its weights [N, H], which may be read until the next one is asked for."""
        ...


class BlockedGradient(Protocol):
    """Where the gradient of such a table goes."""

    def buffers(self) -> Iterator[tuple[RowBlock, Tensor]]:
        """Every block with a buffer [N, H], whose values are to be overwritten by a gradient of the block before the
        next one is asked for. Each pass over the blocks adds to the gradient of the table."""
        ...

    def add_rows(self, rows_T: Tensor, grad_TH: Tensor) -> None:
        """Add gradients to rows of the table; rows may repeat. The ranks that share the table call it together, with
        equally many rows."""
        ...
