"""Context shards: how the samples of one micro-batch are cut, as one rank of the context-parallel axis sees it.

They are made on the host, from the documents of the samples and before these move to a device, and travel with the
micro-batch to every layer. Layers work on the tokens of their own rank and take positions from here, so everything
that depends on where a token stands (positions, dropout, attention) is what it is in one process.

Shapes: B samples, S positions of a sample, R ranks, L = S/R positions of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from megatron3d_kernels.rectangles import Plan, Rectangle
from numpy.typing import NDArray
from torch import Tensor

from megatron3d.comm.device import sent
from megatron3d.errors import ConfigError
from megatron3d.nn.context.cut import ContextCut, Run, Runs, documents_of, places_of, positions_of
from megatron3d.nn.context.plan import ExchangePlan, plan_exchange


@dataclass(frozen=True)
class ContextShards:
    """The cut of a micro-batch.

    Attributes:
        rank: own position on the context-parallel axis.
        runs: what each rank has of a sample: of all samples alike, or of one after another.
        is_causal: whether a token attends to none behind it in its document.
        positions_BL: where the tokens of this rank stand in their sample, int64 [1 or B, L], each row ascending.
        places_BS: where each position of a sample stands when the ranks' tokens are put one after another, int64
            [1 or B, S].
    """

    rank: int
    runs: tuple[Runs, ...]
    is_causal: bool
    positions_BL: Tensor
    places_BS: Tensor

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.runs[0])

    @cached_property
    def plan_of_gathered(self) -> Plan:
        """The scores of this rank's queries with the keys of whole samples, in the order of the sample."""
        return tuple(tuple(_of_gathered(of_sample, self.rank, self.is_causal)) for of_sample in self.runs)

    @cached_property
    def _exchange_plans(self) -> dict[int, ExchangePlan]:
        return {}

    def exchange_plan(self, group_size: int) -> ExchangePlan:
        """What ranks need to know that exchange heads in groups of this size and pass keys round between groups."""
        if group_size not in self._exchange_plans:
            plan = plan_exchange(self.runs, rank=self.rank, group_size=group_size, is_causal=self.is_causal)
            self._exchange_plans[group_size] = plan.sent_to(self.positions_BL.device)
        return self._exchange_plans[group_size]

    def of_kept(self, kept_BK: Tensor) -> tuple[ContextShards, Tensor]:
        """The same of samples of which a layer sees some positions, counted among those; and which rows of this rank
        these are, int64 [B, K/R] ascending.

        Args:
            kept_BK: the positions, int64 on the host, each row ascending.

        Raises: ConfigError if the ranks do not have equally many of them.
        """
        of_samples = self.runs if len(self.runs) > 1 else self.runs * len(kept_BK)
        kept = [_kept_runs(of_one, kept_K.numpy()) for of_one, kept_K in zip(of_samples, kept_BK, strict=True)]
        runs = tuple(of_sample for of_sample, _ in kept)
        counts = sorted({sum(len(run.rows) for run in of_rank) for of_sample in runs for of_rank in of_sample})
        if len(counts) > 1:
            raise ConfigError(
                f"a layer sees from {counts[0]} to {counts[-1]} positions of a sample on the ranks of "
                f"--context-parallel-size {self.num_ranks}; let --random-ltd-router keep equally many on each, or use "
                "--cp-cut contiguous or zigzag with the random choice"
            )
        shards = _shards(runs, self.rank, is_causal=self.is_causal)
        return shards, torch.from_numpy(np.stack([rows[self.rank] for _, rows in kept]))

    def sent_to(self, device: torch.device) -> ContextShards:
        """The same with its tensors on `device`; the host waits for nothing."""
        positions_BL, places_BS = (sent(x, device) for x in (self.positions_BL, self.places_BS))
        return replace(self, positions_BL=positions_BL, places_BS=places_BS)


def shards_of(cut: ContextCut, rank: int, documents_BS: Tensor | None = None, *, is_causal: bool) -> ContextShards:
    """The cut of samples, as a rank sees it.

    Args:
        cut: of a sample.
        rank: on the context-parallel axis.
        documents_BS: number of the document of each token, int64 on the host, ascending in each sample; None where
            every sample is one document.
        is_causal: whether a token attends to none behind it.
    """
    documents = [None] if documents_BS is None else [documents_S.numpy() for documents_S in documents_BS]
    return _shards(tuple(cut.runs(documents_S) for documents_S in documents), rank, is_causal=is_causal)


def _shards(runs: tuple[Runs, ...], rank: int, *, is_causal: bool) -> ContextShards:
    positions_BL = torch.from_numpy(np.stack([positions_of(of_sample[rank]) for of_sample in runs]))
    places_BS = torch.from_numpy(np.stack([places_of(of_sample) for of_sample in runs]))
    return ContextShards(rank, runs, is_causal, positions_BL, places_BS)


def _kept_runs(runs: Runs, kept_K: NDArray[np.int64]) -> tuple[Runs, list[NDArray[np.int64]]]:
    """What is left of the runs of a sample, and the rows of each rank that this is."""
    found, rows = [], []
    for of_rank in runs:
        left, rows_of_rank = [], [np.empty(0, dtype=np.int64)]
        before = 0
        for run in of_rank:
            first, stop = np.searchsorted(kept_K, (run.positions.start, run.positions.stop)).tolist()
            if first < stop:
                left.append(Run(run.document, first, range(before, before + stop - first)))
                rows_of_rank.append(kept_K[first:stop] - run.first + run.rows.start)
                before += stop - first
        found.append(tuple(left))
        rows.append(np.concatenate(rows_of_rank))
    return tuple(found), rows


def _of_gathered(runs: Runs, rank: int, is_causal: bool) -> Iterator[Rectangle]:
    """Of each run of a rank: what stands before it in its document, and the run itself; or all of the document."""
    documents = documents_of(runs)
    for run in runs[rank]:
        document = documents[run.document]
        if not is_causal:
            yield Rectangle(run.rows, document, is_causal=False)
            continue
        if run.first > document.start:
            yield Rectangle(run.rows, range(document.start, run.first), is_causal=False)
        yield Rectangle(run.rows, run.positions, is_causal=True)
