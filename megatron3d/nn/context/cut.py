"""ContextCut: which positions of a sample each context-parallel rank has, as a plain value.

    contiguous   rank r has one stretch, [r S/cp, (r+1) S/cp)
    zigzag       rank r has chunks r and 2cp-1-r of 2cp equal ones: under a causal mask all have the same area
    balanced     rank r has blocks of the sample, chosen so that ranks have about the same area within documents

Whatever the kind, each rank has exactly S/cp positions, in ascending order. What follows is described by **runs**:
maximal stretches of consecutive positions of one document on one rank. A run of queries and a run of keys of the same
document attend fully (the keys are earlier), causally (it is the same run) or not at all, so all that attention needs
to know of a cut is its runs.

Source: Zhu 2024 (ring-flash-attention) and Dubey et al. 2024 (Llama 3), section 3.3.2, for the chunks of zigzag.

Shapes: S positions of a sample, R ranks, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron3d.config.sections.parallel import CONTEXT_CUTS
from megatron3d.errors import ConfigError
from megatron3d.nn.context.balance import balanced_ranges


@dataclass(frozen=True)
class Run:
    """Consecutive positions of one document on one rank.

    Attributes:
        document: its number within the sample.
        first: position in the sample of the first of them.
        rows: where they stand among the positions of their rank.
    """

    document: int
    first: int
    rows: range

    @property
    def positions(self) -> range:
        """Their positions in the sample."""
        return range(self.first, self.first + len(self.rows))


Runs = tuple[tuple[Run, ...], ...]  # of each rank, ascending


@dataclass(frozen=True)
class ContextCut:
    """A kind of cut of samples of `length` positions over `num_ranks` ranks."""

    kind: str
    length: int
    num_ranks: int

    def __post_init__(self) -> None:
        """Raises: ConfigError if a sample of this length cannot be cut into equal parts."""
        assert self.kind in CONTEXT_CUTS, f"a cut is {' or '.join(CONTEXT_CUTS)}, not {self.kind}"
        multiple = chunks_of(self.kind, self.num_ranks)
        if self.length % multiple or self.length < multiple:
            raise ConfigError(
                f"samples of {self.length} tokens cannot be cut in the {self.kind} way over "
                f"--context-parallel-size {self.num_ranks}, which needs a multiple of {multiple}; change the length of "
                "samples, or --cp-cut"
            )

    def ranges(self, documents_S: NDArray[np.int64] | None = None) -> tuple[tuple[range, ...], ...]:
        """The positions of each rank, as ascending ranges that do not touch.

        Args:
            documents_S: number of the document of each position, ascending; None where a sample is one document.
                Only `balanced` looks at it.
        """
        if self.kind == "balanced":
            return balanced_ranges(_starts(documents_S, self.length), self.num_ranks, self.length)
        size = self.length // chunks_of(self.kind, self.num_ranks)
        chunks = [(rank,) for rank in range(self.num_ranks)]
        if self.kind == "zigzag":
            chunks = [(rank, 2 * self.num_ranks - 1 - rank) for rank in range(self.num_ranks)]
        return tuple(joined([range(i * size, (i + 1) * size) for i in of_rank]) for of_rank in chunks)

    def runs(self, documents_S: NDArray[np.int64] | None = None) -> Runs:
        """The runs of each rank."""
        starts = _starts(documents_S, self.length)
        stops = np.append(starts[1:], self.length)
        found = []
        for ranges in self.ranges(documents_S):
            runs: list[Run] = []
            before = 0
            for one in ranges:
                for document in range(int(np.searchsorted(stops, one.start, "right")), len(starts)):
                    first, stop = max(one.start, int(starts[document])), min(one.stop, int(stops[document]))
                    if first >= stop:
                        break
                    runs.append(Run(document, first, range(before, before + stop - first)))
                    before += stop - first
            found.append(tuple(runs))
        return tuple(found)


def chunks_of(kind: str, num_ranks: int) -> int:
    """Into how many equal chunks a kind of cut divides a sample."""
    return num_ranks if kind == "contiguous" else 2 * num_ranks


def positions_of(runs: Sequence[Run]) -> NDArray[np.int64]:
    """The positions of one rank, ascending, int64 [S/R]."""
    return np.concatenate([np.arange(run.first, run.first + len(run.rows), dtype=np.int64) for run in runs])


def places_of(runs: Runs) -> NDArray[np.int64]:
    """Where each position of a sample stands when the ranks' positions are put one after another, int64 [S]."""
    return np.argsort(np.concatenate([positions_of(of_rank) for of_rank in runs]))


def documents_of(runs: Runs) -> dict[int, range]:
    """The positions of each document of a sample, by its number."""
    documents: dict[int, range] = {}
    for run in (run for of_rank in runs for run in of_rank):
        before = documents.get(run.document, run.positions)
        first, stop = min(before.start, run.first), max(before.stop, run.positions.stop)
        documents[run.document] = range(first, stop)
    return documents


def attention_area(runs: Runs, *, is_causal: bool = True) -> list[int]:
    """How many pairs of a query and a key each rank's queries have."""
    documents = documents_of(runs)
    areas = []
    for of_rank in runs:
        area = 0
        for run in of_rank:
            count, document = len(run.rows), documents[run.document]
            seen = run.first - document.start
            area += count * seen + count * (count + 1) // 2 if is_causal else count * len(document)
        areas.append(area)
    return areas


def joined(ranges: Sequence[range]) -> tuple[range, ...]:
    """Ascending ranges, where one begins at the end of the one before put together."""
    merged: list[range] = []
    for one in ranges:
        if merged and merged[-1].stop == one.start:
            merged[-1] = range(merged[-1].start, one.stop)
        else:
            merged.append(one)
    return tuple(merged)


def _starts(documents_S: NDArray[np.int64] | None, length: int) -> NDArray[np.int64]:
    """Where the documents of a sample begin."""
    if documents_S is None:
        return np.zeros(1, dtype=np.int64)
    assert len(documents_S) == length, f"documents of {len(documents_S)} positions for a cut of {length}"
    return np.flatnonzero(np.diff(documents_S, prepend=documents_S[0] - 1))
