"""The balanced cut: equally many positions for each rank, and about the same attention area within documents.

The area of a position is the number of keys that it sees, its place in its document + 1. A sample is divided into
2 R m blocks. Each of the 2 R chunks of S / 2R positions is divided by the same pattern, into blocks of two sizes that
differ by one at most, so there are 2 R blocks of every place of the pattern; as each rank gets equally many of either
size, it gets exactly S / R positions, whatever the documents are. Which blocks a rank gets is a partition of numbers:
the largest block first, each to the rank with the least area that still takes one of this size, and then exchanges of
two blocks between the fullest and another rank as long as they help. m begins at 1, where one document gives the
zigzag cut, and grows until the areas are close, so that a rank has few ranges.

Source: Graham 1969 (longest processing time first), with equal numbers of jobs.

Shapes: S positions of a sample, R ranks, D documents, N blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_OVER_MEAN = 1.02
"""Area of the fullest rank over the mean with which the search ends."""

_MOST_BLOCKS_OF_A_CHUNK = 64


def balanced_ranges(starts_D: NDArray[np.int64], num_ranks: int, length: int) -> tuple[tuple[range, ...], ...]:
    """The positions of each rank as ascending ranges that do not touch.

    Args:
        starts_D: where the documents of the sample begin, ascending from 0.
        num_ranks: R, of which twice as many divide the length.
        length: S.
    """
    position_S = np.arange(length)
    area_S = position_S - np.repeat(starts_D, np.diff(starts_D, append=length)) + 1
    area_before = np.concatenate([[0], area_S.cumsum()])
    chunk = length // (2 * num_ranks)
    best: tuple[float, NDArray[np.int64], NDArray[np.int64]] | None = None
    blocks = 1
    while blocks <= min(chunk, _MOST_BLOCKS_OF_A_CHUNK):
        bounds = _bounds(chunk, blocks, 2 * num_ranks)
        area_N, size_N = np.diff(area_before[bounds]), np.diff(bounds)
        owner_N = _owners(area_N, size_N, num_ranks)
        sums = np.bincount(owner_N, area_N, minlength=num_ranks)
        ratio = float(sums.max() / sums.mean())
        if best is None or ratio < best[0]:
            best = ratio, bounds, owner_N
        if ratio <= MAX_OVER_MEAN:
            break
        blocks *= 2
    assert best is not None, f"{length} positions for {num_ranks} ranks"
    _, bounds, owner_N = best
    return tuple(_ranges_of(bounds, owner_N == rank) for rank in range(num_ranks))


def _bounds(chunk: int, blocks: int, chunks: int) -> NDArray[np.int64]:
    """Where the blocks begin, and where the last one stops."""
    pattern = np.arange(blocks) * chunk // blocks
    return np.append((np.arange(chunks)[:, None] * chunk + pattern).ravel(), chunks * chunk)


def _owners(area_N: NDArray[np.int64], size_N: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """The rank of each block."""
    sizes = sorted({int(size) for size in size_N})
    room = {size: [int((size_N == size).sum()) // num_ranks] * num_ranks for size in sizes}
    sums = [0] * num_ranks
    owner_N = np.empty(len(area_N), dtype=np.int64)
    for block in np.argsort(-area_N, kind="stable").tolist():
        free = room[int(size_N[block])]
        rank = min((rank for rank in range(num_ranks) if free[rank]), key=lambda rank: sums[rank])
        free[rank] -= 1
        sums[rank] += int(area_N[block])
        owner_N[block] = rank
    for _ in range(len(area_N)):
        if not _exchange(area_N, size_N, owner_N, sums):
            break
    return owner_N


def _exchange(
    area_N: NDArray[np.int64], size_N: NDArray[np.int64], owner_N: NDArray[np.int64], sums: list[int]
) -> bool:
    """Exchange two blocks of one size between the fullest rank and another where that lowers the larger of their sums
    most; whether one was found."""
    fullest = int(np.argmax(sums))
    mean = sum(sums) / len(sums)
    if sums[fullest] <= MAX_OVER_MEAN * mean:
        return False
    own_N, found = np.flatnonzero(owner_N == fullest), (sums[fullest], -1, -1)
    for rank in range(len(sums)):
        other_N = np.flatnonzero(owner_N == rank)
        if rank == fullest or not len(other_N):
            continue
        moved = area_N[own_N][:, None] - area_N[other_N]
        after = np.maximum(sums[fullest] - moved, sums[rank] + moved)
        after = np.where(size_N[own_N][:, None] == size_N[other_N], after, sums[fullest])
        best = int(after.argmin())
        if after.flat[best] < found[0]:
            found = (int(after.flat[best]), int(own_N[best // len(other_N)]), int(other_N[best % len(other_N)]))
    _, one, other = found
    if one < 0:
        return False
    rank, moved = int(owner_N[other]), int(area_N[one] - area_N[other])
    owner_N[one], owner_N[other] = rank, fullest
    sums[fullest] -= moved
    sums[rank] += moved
    return True


def _ranges_of(bounds: NDArray[np.int64], is_own_N: NDArray[np.bool_]) -> tuple[range, ...]:
    """The blocks of one rank, neighbours put together."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_own_N.astype(np.int8), [0]])))
    return tuple(range(int(bounds[first]), int(bounds[stop])) for first, stop in edges.reshape(-1, 2))
