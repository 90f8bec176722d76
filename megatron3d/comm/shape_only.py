"""ShapeOnlyGroup: a process group of ranks that are not there, for tensors that have shapes and no values.

On an axis with such a group the layers of a large layout run in one process, on meta or fake tensors: every collective
leaves its result as it was allocated. The memory ledger records a rank's allocations in this way.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


class _Done(dist.Work):
    """A collective that is over, and the copy that its backend would hold until somebody waits for it."""

    def __init__(self, copy: Tensor | None = None) -> None:
        super().__init__()
        self._copy = copy

    def wait(self, timeout: Any = None) -> bool:
        """Release the copy."""
        self._copy = None
        return True

    def is_completed(self) -> bool:
        """Always."""
        return True


class ShapeOnlyGroup(dist.ProcessGroup):
    """The collectives of `comm/collectives.py` that layers use; any other fails.

    `copies` means that the collectives take the memory that gloo's take: a gather as much again as it brings while it
    starts, a reduce-scatter as much again as it reads until it is waited for. NCCL's take none.
    """

    def __init__(self, rank: int, size: int, *, copies: bool) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]  torch's stub knows one of two forms
        self._copies = copies

    # torch calls a group by these names, some of which begin with an underscore.

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """In place, without a copy."""
        return _Done()

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        if self._copies:
            output.new_empty(output.shape)
        return _Done()

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return _Done(input.new_empty(input.shape) if self._copies else None)

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> dist.Work:
        """Without a copy."""
        return _Done()
