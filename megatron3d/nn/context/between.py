"""Which queries of one rank attend to which keys of another, as rectangles, from the runs of both.

A run of queries attends fully to the keys of its document that stand before it, which are neighbours among the keys of
a rank, and causally to itself where these keys have it. So a run has at most two rectangles, however the keys are cut.
Without a causal mask it has one: all keys of its document.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from megatron3d_kernels.rectangles import Rectangle

from megatron3d.nn.context.cut import Run


def rectangles_between(queries: Iterable[Run], keys: Iterable[Run], *, is_causal: bool) -> tuple[Rectangle, ...]:
    """The scores that a mask within documents allows between the queries of one rank and the keys of another.

    Args:
        queries: runs of a rank, ascending.
        keys: runs of the same sample, ascending; they have the whole of a run of queries or nothing of it.
        is_causal: whether a query attends to the keys up to its own alone, instead of to all of its document.
    """
    keys_of: dict[int, list[Run]] = {}
    for run in keys:
        keys_of.setdefault(run.document, []).append(run)
    found: list[Rectangle] = []
    for rectangle in _rectangles(queries, keys_of, is_causal):
        if found and _continues(found[-1], rectangle):
            rectangle = replace(rectangle, queries=range(found.pop().queries.start, rectangle.queries.stop))
        found.append(rectangle)
    return tuple(found)


def _continues(last: Rectangle, following: Rectangle) -> bool:
    """Whether two full rectangles are one: neighbouring queries with the same keys."""
    is_full = not (last.is_causal or following.is_causal)
    return is_full and last.keys == following.keys and last.queries.stop == following.queries.start


def _rectangles(queries: Iterable[Run], keys_of: Mapping[int, Sequence[Run]], is_causal: bool) -> Iterator[Rectangle]:
    for run in queries:
        keys = keys_of.get(run.document)
        if keys and is_causal:
            yield from _causal(run, keys)
        elif keys:
            yield Rectangle(run.rows, range(keys[0].rows.start, keys[-1].rows.stop), is_causal=False)


def _causal(run: Run, keys: Sequence[Run]) -> Iterator[Rectangle]:
    """A full rectangle with the keys before a run, and a causal one with its own."""
    at = bisect_right([one.first for one in keys], run.first) - 1
    if at < 0:
        return
    here, first = keys[at], keys[0].rows.start
    before = min(run.first - here.first, len(here.rows))
    stop = here.rows.start + before
    if first < stop:
        yield Rectangle(run.rows, range(first, stop), is_causal=False)
    if before < len(here.rows):
        yield Rectangle(run.rows, range(stop, stop + len(run.rows)), is_causal=True)
