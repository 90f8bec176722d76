"""What an exchange of keys or heads needs to know of the cut of a micro-batch, made on the host before it starts.

Ranks are grouped: the A consecutive ones of a group exchange heads, and groups pass keys round a ring. A group is
treated as one rank with the positions of all of its ranks, in ascending order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron3d_kernels.rectangles import Plan
from torch import Tensor

from megatron3d.comm.device import sent
from megatron3d.nn.context.between import rectangles_between
from megatron3d.nn.context.cut import Run, Runs, positions_of


@dataclass(frozen=True)
class ExchangePlan:
    """For one rank and one way of grouping.

    Attributes:
        order_BAs: int64 [1 or B, A, S/cp]: for each sample (or all) and rank of the group, where its positions stand
            among those of the group.
        by_group: for each group, which queries of this group attend to which of its keys.
    """

    order_BAs: Tensor
    by_group: tuple[Plan, ...]

    def sent_to(self, device: torch.device) -> ExchangePlan:
        """The same with its tensor on a device."""
        return ExchangePlan(sent(self.order_BAs, device), self.by_group)


def plan_exchange(runs: Sequence[Runs], *, rank: int, group_size: int, is_causal: bool) -> ExchangePlan:
    """Plan for one rank.

    Args:
        runs: of each sample, or of all samples at once, the runs of every rank.
        rank: position on the context-parallel axis.
        group_size: A, which divides the number of ranks.
        is_causal: as in `rectangles_between`.
    """
    number = rank // group_size
    orders, by_sample = [], []
    for of_ranks in runs:
        groups = [of_ranks[first : first + group_size] for first in range(0, len(of_ranks), group_size)]
        joined = [_joined_runs(group) for group in groups]
        positions_S = positions_of(joined[number])
        orders.append([np.searchsorted(positions_S, positions_of(of_rank)) for of_rank in groups[number]])
        by_sample.append([rectangles_between(joined[number], keys, is_causal=is_causal) for keys in joined])
    return ExchangePlan(torch.from_numpy(np.array(orders)), tuple(zip(*by_sample)))


def _joined_runs(group: Runs) -> tuple[Run, ...]:
    """The runs of ranks whose positions stand together in ascending order."""
    joined: list[Run] = []
    before = 0
    for run in sorted((run for of_rank in group for run in of_rank), key=lambda run: run.first):
        count = len(run.rows)
        last = joined[-1] if joined else None
        if last and last.document == run.document and last.positions.stop == run.first:
            joined[-1] = Run(last.document, last.first, range(last.rows.start, before + count))
        else:
            joined.append(Run(run.document, run.first, range(before, before + count)))
        before += count
    return tuple(joined)
