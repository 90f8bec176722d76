"""Reading a prompt with context-parallel ranks: each works on some of its places, and all have the keys of all.

A chunk of the prompt is cut as a sample is in training, zigzag. Every layer gathers its keys and values into the cache
of every rank, in the order of the sequence; this rank's queries attend to those in front of them. So generation goes on
from the cache as on one rank, and all ranks of the axis generate the same.

Dims: B sequences, S places of a chunk, L of them on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron3d_kernels.rectangles import Plan, Rectangle

from megatron3d.comm.mesh import Axis
from megatron3d.nn.context.cut import ContextCut, chunks_of
from megatron3d.nn.context.shards import ContextShards, shards_of

_CUT = "zigzag"


def chunks(start: int, stop: int, *, at_once: int, num_ranks: int) -> Iterator[tuple[range, bool]]:
    """The places from `start` to `stop` in chunks, and whether a chunk is cut over the ranks.

    Chunks that are cut have a multiple of 2 x ranks places, at most `at_once` (but at least 2) on each rank. The
    last place is in none of them, so that every rank has what the model predicts after it.
    """
    multiple = chunks_of(_CUT, num_ranks)
    while start < stop:
        most = min(max(2, at_once) * num_ranks, stop - start - 1) // multiple * multiple
        is_cut = num_ranks > 1 and most > 0
        size = most if is_cut else min(at_once, stop - start)
        yield range(start, start + size), is_cut
        start += size


def cut_chunk(places: range, axis: Axis, device: torch.device) -> ContextShards:
    """Which places of a chunk this rank works on, the same of every sequence; counted from its beginning."""
    return shards_of(ContextCut(_CUT, len(places), axis.size), axis.rank, is_causal=True).sent_to(device)


def plan_of_chunk(shards: ContextShards, places: range, padding: Sequence[int]) -> Plan:
    """The scores of this rank's queries with the keys of the cache.

    Args:
        shards: of the chunk.
        places: of the chunk in the sequences.
        padding: places at the left of each sequence that nothing behind them attends to.
    """
    (of_all,) = shards.runs
    return tuple(
        tuple(one for run in of_all[shards.rank] for one in _of_run(run.rows, places.start + run.first, first_token))
        for first_token in (padding if any(padding) else padding[:1])
    )


def _of_run(rows: range, first: int, first_token: int) -> Iterator[Rectangle]:
    """Of queries at consecutive places from `first` on: padding attends among itself, tokens to all tokens so far."""
    num_padding = min(max(0, first_token - first), len(rows))
    for part, begins in ((rows[:num_padding], first), (rows[num_padding:], first + num_padding)):
        if not part:
            continue
        if first_token < begins:
            yield Rectangle(part, range(first_token, begins), is_causal=False)
        yield Rectangle(part, range(begins, begins + len(part)), is_causal=True)
