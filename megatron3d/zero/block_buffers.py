"""The buffers of a table that stage 3 cuts into blocks of rows: two blocks of weights, a few of gradients.

What a rank owns, stores and updates of the table is what it would be of any unit (`buffers.py`); only what is gathered
and reduced at a time is a block. Weights of the next block are on their way while one is used. The gradient of a
block leaves as soon as the next block is asked for, in every backward, and counts among the reductions under way.

A lookup's gradient is a few rows. Where the ranks together look up fewer rows than the table has, the rows travel and
each rank adds those it owns; else every block of the table does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron3d.comm.collectives import Pending, start_all_gather, start_all_gather_into, start_reduce_scatter_into
from megatron3d.comm.mesh import Axis
from megatron3d.offload.stream import Waitable
from megatron3d.params.grads import add_to_rows
from megatron3d.params.row_blocks import BlockedGradient, RowBlock
from megatron3d.zero.buffers import GradBuffer, TransientBuffers, WeightBacking, WeightBuffer, size_bytes
from megatron3d.zero.cut_tables import BLOCKS_AT_ONCE, Blocks, block_name
from megatron3d.zero.flat import Span
from megatron3d.zero.kinds import KindAxes


@dataclass(frozen=True)
class BlockBacking(WeightBacking):
    """Where a backing of weights keeps a table's shard: a record for each block, of `lengths` elements."""

    lengths: tuple[int, ...]

    @property
    def _names(self) -> list[str]:
        return [block_name(self.unit, number) for number in range(len(self.lengths))]

    def start_fetch_block(self, number: int, into: Tensor) -> Waitable:
        """Start copying this rank's part of a block to the device."""
        return self.backing.start_fetch(self._names[number], into)

    def start_store_block(self, number: int, part: Tensor) -> Waitable:
        """Start replacing this rank's part of a block by one on the device."""
        return self.backing.start_store(self._names[number], part)

    def start_store(self, shard: Tensor) -> Waitable:
        """Start replacing the shard by one on the device."""
        parts = shard.split(self.lengths)
        return _All([self.start_store_block(number, part) for number, part in enumerate(parts)])

    @contextmanager
    def opened(self, *, writes: bool) -> Iterator[Tensor]:
        """A copy of the shard on the host, for the length of the block; `writes` keeps changes."""
        with self.backing.opened(self._names, writes=writes) as records:
            parts = [part for name in self._names for part in records[name].values()]
            shard = torch.cat(parts)
            yield shard
            if writes:
                for part, values in zip(parts, shard.split(self.lengths), strict=True):
                    part.copy_(values)


class _All:
    """Several things under way."""

    def __init__(self, parts: list[Waitable]) -> None:
        self._parts = parts

    def wait(self) -> None:
        """Return when all are over."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.callback(part.wait)


class BlockedWeights(WeightBuffer):
    """The weights of a table in blocks: a `params.row_blocks.BlockedTable`.

    `full`, which the parameter is a view of, has no memory after construction. Between `start_gather` and `free` there
    is room for `BLOCKS_AT_ONCE`, which are two.
    """

    def __init__(
        self,
        initial: Tensor,
        own: Span,
        axis: Axis,
        *,
        blocks: Blocks,
        dtype: torch.dtype,
        transient: TransientBuffers,
        keeps_master: bool,
        backing: BlockBacking | None = None,
    ) -> None:
        """Args: `blocks` of the table, the others as in `WeightBuffer`."""
        super().__init__(
            initial,
            own,
            axis,
            dtype=dtype,
            is_sharded=True,
            transient=transient,
            keeps_master=keeps_master,
            backing=backing,
        )
        self._blocks, self._block_backing = blocks, backing
        self._width = own.length // blocks[0].rows_per_rank
        self._slots: list[Tensor] = []
        # Which blocks are in the slots, or on their way there.
        self._numbers: list[int | None] = [None] * BLOCKS_AT_ONCE
        self._fetching_blocks: dict[int, Waitable] = {}
        self._gathering_blocks: dict[int, Pending] = {}

    @property
    def num_rows(self) -> int:
        """Rows of the table, with those that pad it."""
        return self._blocks[0].num_ranks * self._blocks[0].rows_per_rank

    def start_gather(self) -> None:
        """Take the room and start bringing the first block; nothing where that has begun."""
        if not self._slots:
            length = max(block.num_rows for block in self._blocks) * self._width
            self._slots = list(self.full.new_empty(BLOCKS_AT_ONCE * length).split(length))
            self._transient.take(sum(size_bytes(slot) for slot in self._slots))
            self._start(0)

    def finish_gather(self) -> None:
        """Wait for the blocks on their way."""
        for number in range(len(self._blocks)):
            self._finish(number)

    def free(self) -> None:
        """Release the room; nothing where there is none. The first call frees the table as it was made."""
        super().free()
        if self._slots:
            self.finish_gather()
            self._transient.take(-sum(size_bytes(slot) for slot in self._slots))
            self._slots, self._numbers = [], [None] * BLOCKS_AT_ONCE

    def set_shard(self, values: Tensor, at: Span | None = None) -> None:
        """As `WeightBuffer.set_shard`; a range is that of a block."""
        if at is None or self._block_backing is None:
            super().set_shard(values, at)
            return
        self.finish_gather()
        number = next(n for n, block in enumerate(self._blocks) if block.start * self._width == at.start)
        self._block_backing.start_store_block(number, values.to(self.full.dtype)).wait()

    def weights(self) -> Iterator[tuple[RowBlock, Tensor]]:
        """Every block with its weights [N, H], until the next one is asked for."""
        assert self._slots, "the blocks of a table are read outside of its place"
        for number, block in enumerate(self._blocks):
            self._start(number)
            if number + 1 < len(self._blocks):
                self._start(number + 1)
            self._finish(number)
            yield block, self._room(number).view(-1, self._width)

    def _room(self, number: int) -> Tensor:
        return self._slots[number % BLOCKS_AT_ONCE][: self._blocks[number].num_rows * self._width]

    def _start(self, number: int) -> None:
        """Start gathering a block into its slot; nothing where it is there or on its way."""
        at = number % BLOCKS_AT_ONCE
        if self._numbers[at] == number:
            return
        self._numbers[at] = number
        if self._block_backing is not None:
            self._fetching_blocks[number] = self._block_backing.start_fetch_block(number, self._own_part_of(number))
            return
        block = self._blocks[number]
        own = self.shard[block.start * self._width : block.stop * self._width]
        self._gathering_blocks[number] = start_all_gather_into(self._room(number), own, self._axis)

    def _own_part_of(self, number: int) -> Tensor:
        room = self._room(number)
        length = room.numel() // self._axis.size
        return room[self._axis.rank * length : (self._axis.rank + 1) * length]

    def _finish(self, number: int) -> None:
        """Wait until a block may be read, if it is on its way; one that comes from the backing is gathered now."""
        if number in self._fetching_blocks:
            self._fetching_blocks.pop(number).wait()
            own = self._own_part_of(number)
            self._gathering_blocks[number] = start_all_gather_into(self._room(number), own, self._axis)
        if number in self._gathering_blocks:
            self._gathering_blocks.pop(number).wait()


class BlockedGradients(GradBuffer):
    """The gradient of a table in blocks: a `params.row_blocks.BlockedGradient`."""

    def __init__(
        self,
        own: Span,
        axes: KindAxes,
        *,
        blocks: Blocks,
        dtype: torch.dtype,
        device: torch.device,
        transient: TransientBuffers,
    ) -> None:
        """Args: `blocks` of the table, of which this rank owns `own`; the others as in `GradBuffer`."""
        super().__init__(0, own, axes, dtype=dtype, device=device, is_resident=False, transient=transient)
        self._blocks = blocks
        self._width = own.length // blocks[0].rows_per_rank
        self._scatters = [_BlockScatter(self, block, transient) for block in blocks]

    def start_scatter(self) -> None:
        """Nothing: every block's reduction has begun when its gradient was there."""

    def finish_scatter(self) -> None:
        """Wait for the blocks on their way, and add what comes to `own`."""
        for scatter in self._scatters:
            scatter.finish_scatter()

    def buffers(self) -> Iterator[tuple[RowBlock, Tensor]]:
        """Every block with a buffer [N, H] to write to; its reduction starts when the next one is asked for."""
        for block, scatter in zip(self._blocks, self._scatters, strict=True):
            grads = torch.empty(block.num_rows * self._width, dtype=self._dtype, device=self._device)
            self._transient.take(size_bytes(grads))
            yield block, grads.view(-1, self._width)
            scatter.start(grads)

    def add_rows(self, rows_T: Tensor, grad_TH: Tensor) -> None:
        """Add the gradients of all ranks to their rows; rows may repeat. Every rank brings equally many."""
        own_RH = self.own.view(-1, self._width)
        add_to_table(rows_T, grad_TH.to(self._dtype), own_RH, self, blocks=self._blocks, axis=self._axes.shard)

    def start_block(self, block: RowBlock, grads: Tensor) -> Pending:
        """Start summing a block over the ranks, each of which gets what it owns of it."""
        length = block.rows_of_each * self._width
        if self._landing is None:
            rank = self._axes.shard.rank
            into = grads[rank * length : (rank + 1) * length]
        else:
            into = self._landing[block.start * self._width : block.stop * self._width]
        return start_reduce_scatter_into(into, grads, self._axes.shard)

    def finish_block(self, block: RowBlock, reduced: Tensor) -> None:
        """Add what came of a block to `own`."""
        self.own[block.start * self._width : block.stop * self._width].add_(reduced)


def add_to_table(
    rows_T: Tensor,
    grad_TH: Tensor,
    own_RH: Tensor,
    gradient: BlockedGradient,
    *,
    blocks: Blocks,
    axis: Axis,
) -> None:
    """Add the gradients of the rows that all ranks of the axis have looked up, equally many on each.

    Where those are fewer than the rows of the table, they come from all ranks, as many at once as make up a block, and
    each rank adds those it owns; else they are added to the blocks.

    Args:
        rows_T: of the table, int64; some may be the same.
        grad_TH: their gradients, in the dtype in which gradients travel.
        own_RH: the sums of the rows that this rank owns.
        gradient: the buffers of the blocks.
        blocks: of the table.
        axis: the ranks that each own a part of it.
    """
    rows_of_each = blocks[0].rows_per_rank
    if rows_T.numel() > rows_of_each:
        for block, buffer_NH in gradient.buffers():
            position_T, elsewhere_T = block.positions(rows_T)
            add_to_rows(buffer_NH.zero_(), position_T, grad_TH.masked_fill(elsewhere_T.unsqueeze(-1), 0.0))
        return
    at_once = max(block.rows_of_each for block in blocks)
    for some_T, some_TH in zip(rows_T.split(at_once), grad_TH.split(at_once), strict=True):
        coming = start_all_gather(some_T, axis)
        all_grads_TH = start_all_gather(some_TH, axis).wait()
        all_rows_T = coming.wait()
        elsewhere_T = all_rows_T // rows_of_each != axis.rank
        own_grads_TH = all_grads_TH.masked_fill(elsewhere_T.unsqueeze(-1), 0.0)
        add_to_rows(own_RH, all_rows_T.remainder(rows_of_each), own_grads_TH)


class _BlockScatter:
    """The reduction of one block, under way or not."""

    def __init__(self, grads: BlockedGradients, block: RowBlock, transient: TransientBuffers) -> None:
        self._grads, self._block, self._transient = grads, block, transient
        self._leaving: Tensor | None = None
        self._pending: Pending | None = None

    def start(self, leaving: Tensor) -> None:
        """Start it, once the one before of the same block is over."""
        self.finish_scatter()
        self._leaving, self._pending = leaving, self._grads.start_block(self._block, leaving)
        self._transient.add_reduction(self)

    def finish_scatter(self) -> None:
        """Wait for it, if it is under way."""
        if self._pending is None:
            return
        self._grads.finish_block(self._block, self._pending.wait())
        self._transient.take(-size_bytes(self._leaving))
        self._leaving = self._pending = None
