"""Whether the boxes of a tensor are the whole of it: each element in exactly one box. Plain arithmetic on numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from megatron3d.params.boxes import Box


def cover_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """What keeps boxes inside a tensor of `shape` from covering it exactly once, as a clause; None if they do."""
    if (pair := _overlapping(boxes)) is not None:
        first, second = pair
        if first == second:
            return f"its box of {first.size} at {first.offset} is there twice"
        return f"its boxes of {first.size} at {first.offset} and of {second.size} at {second.offset} overlap"
    held, full = sum(box.numel for box in boxes), prod(shape)
    # Without an overlap and inside the tensor, boxes leave a gap exactly where they hold fewer elements.
    return None if held == full else f"its {len(boxes)} boxes hold {held} of its {full} elements"


def _overlapping(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None.

    A sweep along the first dimension: of the boxes that begin before the next one, only those that have not ended can
    overlap it. Few have not, since boxes are rows of a parameter, cut across by tensor parallelism at most.
    """
    filled = sorted((box for box in boxes if box.numel), key=lambda box: box.offset)
    if filled and not filled[0].size:
        return (filled[0], filled[1]) if len(filled) > 1 else None
    open_boxes: list[Box] = []
    for box in filled:
        open_boxes = [one for one in open_boxes if one.offset[0] + one.size[0] > box.offset[0]]
        for one in open_boxes:
            if _share_elements(one, box):
                return one, box
        open_boxes.append(box)
    return None


def _share_elements(a: Box, b: Box) -> bool:
    return all(
        a_start < b_start + b_size and b_start < a_start + a_size
        for a_start, a_size, b_start, b_size in zip(a.offset, a.size, b.offset, b.size)
    )
