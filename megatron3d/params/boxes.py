"""Boxes: which part of a logical tensor a rank holds, as plain numbers.

A box is an axis-aligned block of a full tensor. What a rank holds of a parameter is a list of boxes in the order in
which their elements lie in a one-dimensional buffer. Checkpoints know names, full shapes and boxes and nothing of
ranks, stages or flat buffers; that is why any layout can read what any other wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """The block `[offset[i], offset[i] + size[i])` along every dimension i of a full tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return prod(self.size)

    def shifted(self, by: tuple[int, ...]) -> Box:
        """The same box with `by` added to its offset."""
        return Box(tuple(o + b for o, b in zip(self.offset, by, strict=True)), self.size)

    def slices(self) -> tuple[slice, ...]:
        """Index that cuts the box out of the full tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))


def flat_range_to_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut the row-major elements [start, stop) of a block of `shape` into boxes, in order; at most 2d - 1 of them.

    A range that starts or ends inside a row leaves a part of a row at that end, which is the same question one
    dimension lower; whatever lies between is whole rows and so one box.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Box((start,), (stop - start,))] if shape else [Box((), ())]
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _in_row(shape, first, start - first * row, stop - first * row)
    head = _in_row(shape, first, start % row, row) if start % row else []
    tail = _in_row(shape, last, 0, stop % row) if stop % row else []
    whole_from, whole_to = first + bool(head), last + (not tail)
    zeros = (0,) * (len(shape) - 1)
    body = [Box((whole_from, *zeros), (whole_to - whole_from, *shape[1:]))] if whole_to > whole_from else []
    return head + body + tail


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    return [Box((row, *b.offset), (1, *b.size)) for b in flat_range_to_boxes(shape[1:], start, stop)]


@dataclass(frozen=True)
class ShardView:
    """What a rank holds of a full tensor: boxes, and the one-dimensional buffer that holds them one after another.

    `data` is a view of live memory: a save reads it and a load writes into it. A rank that holds nothing of a tensor
    has no boxes and an empty buffer.
    """

    full_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    data: Tensor

    def __post_init__(self) -> None:
        held = sum(box.numel for box in self.boxes)
        if self.data.dim() != 1 or self.data.numel() != held:
            raise ValueError(f"boxes hold {held} elements, the buffer has shape {tuple(self.data.shape)}")

    def box_tensors(self) -> list[tuple[Box, Tensor]]:
        """Each box with its part of the buffer, viewed in the shape of the box."""
        parts = self.data.split([box.numel for box in self.boxes]) if self.boxes else []
        return [(box, part.view(box.size)) for box, part in zip(self.boxes, parts, strict=True)]
