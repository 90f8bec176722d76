"""RecordedTable: a table that stage 3 of ZeRO cuts into blocks of rows, in the record of a stage.

Its weights and the buffers of its gradient have shapes and no memory, and are no part of the record: `transient.py`
knows how large they are. The record says when a block is gathered and when its gradient needs a buffer and has come.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron3d.comm.mesh import Axis
from megatron3d.comm.meter import Meter
from megatron3d.comm.shape_only import ShapeOnlyGroup
from megatron3d.params.row_blocks import RowBlock
from megatron3d.planner.recording import Kind, StorageRecorder
from megatron3d.zero.block_buffers import add_to_table
from megatron3d.zero.cut_tables import Blocks, block_name


class RecordedTable:
    """A `params.row_blocks.BlockedTable` and `BlockedGradient` in one."""

    def __init__(
        self,
        recorder: StorageRecorder,
        unit: str,
        blocks: Blocks,
        parameter: nn.Parameter,
        of_gradients: torch.dtype,
        *,
        copies: bool,
    ) -> None:
        """A table of one unit.

        Args:
            recorder: takes the notes.
            unit: of the table.
            blocks: of the table.
            parameter: the table.
            of_gradients: dtype in which its gradients are reduced.
            copies: whether collectives take memory, as gloo's do.
        """
        self._recorder, self._unit, self._blocks = recorder, unit, blocks
        size, width = blocks[0].num_ranks, parameter.shape[1]
        group = ShapeOnlyGroup(0, size, copies=copies) if size > 1 else None
        self._axis = Axis("shard", size, 0, tuple(range(size)), group, Meter(), pairwise=copies)
        rows, device = [block.num_rows for block in blocks], parameter.device
        self._weights = [torch.empty(count, width, dtype=parameter.dtype, device=device) for count in rows]
        self._gradients = [torch.empty(count, width, dtype=of_gradients, device=device) for count in rows]
        self._own_RH = torch.empty(blocks[0].rows_per_rank, width, device=device)
        recorder.ignore([*self._weights, *self._gradients, self._own_RH])

    @property
    def num_rows(self) -> int:
        """Rows of all blocks."""
        return self._blocks[0].num_ranks * self._blocks[0].rows_per_rank

    def weights(self) -> Iterator[tuple[RowBlock, Tensor]]:
        """Every block; a gather of each is noted."""
        for block, weight_NH in zip(self._blocks, self._weights, strict=True):
            self._recorder.mark(Kind.GATHER_BLOCK, self._unit)
            yield block, weight_NH

    def buffers(self) -> Iterator[tuple[RowBlock, Tensor]]:
        """Every block; that its gradient needs a buffer, and that it has come, is noted."""
        for number, (block, buffer_NH) in enumerate(zip(self._blocks, self._gradients, strict=True)):
            name = block_name(self._unit, number)
            self._recorder.mark(Kind.ARRIVE, name)
            yield block, buffer_NH
            self._recorder.mark(Kind.CONTRIBUTE, name)

    def add_rows(self, rows_T: Tensor, grad_TH: Tensor) -> None:
        """As the gradient of a run does it."""
        grads = grad_TH.to(self._gradients[0].dtype)
        add_to_table(rows_T, grads, self._own_RH, self, blocks=self._blocks, axis=self._axis)
