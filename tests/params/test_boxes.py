"""Boxes: any flat range of a block is cut into few boxes that cover it exactly and in order."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.params.boxes import Box, ShardView, flat_range_to_boxes

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def shape_and_range(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape and a flat range inside it, empty ranges included."""
    shape = draw(SHAPES)
    start, stop = sorted(draw(st.tuples(st.integers(0, prod(shape)), st.integers(0, prod(shape)))))
    return shape, start, stop


@given(shape_and_range())
def test_boxes_cut_out_of_a_numbered_block_give_the_range_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbered = torch.arange(prod(shape)).view(shape)
    cut = [numbered[box.slices()].flatten() for box in flat_range_to_boxes(shape, start, stop)]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *cut]).tolist() == list(range(start, stop))


@given(shape_and_range())
def test_a_range_of_a_block_of_d_dimensions_is_at_most_2d_minus_1_boxes_and_none_is_empty(
    case: tuple[tuple[int, ...], int, int],
) -> None:
    shape, start, stop = case
    boxes = flat_range_to_boxes(shape, start, stop)
    assert len(boxes) <= 2 * len(shape) - 1
    assert all(box.numel > 0 for box in boxes)


def test_the_bound_of_2d_minus_1_boxes_is_reached() -> None:
    # All but the first and last element of a cube: a row rest, a plane rest, the middle, and the same mirrored.
    assert len(flat_range_to_boxes((4, 4, 4), 1, 63)) == 5


@given(SHAPES)
def test_the_whole_block_is_one_box(shape: tuple[int, ...]) -> None:
    assert flat_range_to_boxes(shape, 0, prod(shape)) == [Box((0,) * len(shape), shape)]


def test_a_scalar_is_one_box_without_dimensions() -> None:
    assert flat_range_to_boxes((), 0, 1) == [Box((), ())]
    assert flat_range_to_boxes((), 0, 0) == []


@given(shape_and_range(), st.data())
def test_a_shifted_box_cuts_the_same_block_out_of_a_larger_tensor(
    case: tuple[tuple[int, ...], int, int], data: st.DataObject
) -> None:
    shape, start, stop = case
    by = tuple(data.draw(st.integers(0, 3)) for _ in shape)
    block = torch.arange(prod(shape)).view(shape)
    larger = torch.full(tuple(n + b for n, b in zip(shape, by, strict=True)), -1)
    larger[Box(by, shape).slices()] = block
    for box in flat_range_to_boxes(shape, start, stop):
        assert torch.equal(larger[box.shifted(by).slices()], block[box.slices()])


def test_boxes_of_a_view_are_live_parts_of_the_buffer_in_the_shape_of_their_box() -> None:
    boxes = (Box((0, 1), (1, 2)), Box((1, 0), (2, 3)))
    view = ShardView((3, 3), boxes, torch.arange(8.0))
    tensors = view.box_tensors()
    assert [box for box, _ in tensors] == list(boxes)
    assert tensors[1][1].tolist() == [[2, 3, 4], [5, 6, 7]]
    tensors[0][1].fill_(9)
    assert view.data[:2].tolist() == [9, 9]


def test_a_view_of_nothing_has_no_boxes() -> None:
    assert ShardView((3, 3), (), torch.empty(0)).box_tensors() == []


@pytest.mark.parametrize("data", [torch.empty(5), torch.empty(2, 2)])
def test_a_buffer_that_does_not_fit_its_boxes_is_refused(data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="boxes hold 4 elements"):
        ShardView((2, 2), (Box((0, 0), (2, 2)),), data)
