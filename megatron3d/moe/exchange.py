"""The exchange of rows: each goes to the ranks that hold its expert, and comes back to the rank of its token.

Ranks of the `expert` axis hold different experts, so rows go there by an all-to-all of uneven stretches. Ranks of the
`expert_tp` axis hold parts of the same experts, so each needs the rows of all of them: they are gathered there, and
what the parts give is summed on the way back. How many rows come is known to nobody before: the counts of each expert
are exchanged first, and read back to the host, once a layer; nothing is where every expert gets equally many, some of
them padding.

    rows, sorted by expert      ->  expert      ->  expert_tp  ->  sorted by this rank's experts
    rows of the same order      <-  expert      <-  expert_tp  <-  partial sums

Source: Lepikhin et al. 2020 (GShard), section 3.2; Liu et al. 2025 (MoE Parallel Folding) for the two axes.

Shapes: R rows, H hidden, E experts, L experts of this rank, X ranks of `expert`, P ranks of `expert_tp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from megatron3d.comm import collectives, typed
from megatron3d.comm.device import sent as on_device
from megatron3d.comm.mesh import Axis
from megatron3d.comm.replay import Replay


@dataclass(frozen=True)
class Arrival:
    """How rows came to this rank's experts, for the way back.

    Attributes:
        counts: rows of each of this rank's experts, those of all ranks together.
        sent, received: rows to and from each rank of `expert`.
        gathered: rows from each rank of `expert_tp`.
        order_R: for rows by expert, where each came in; None where they came by expert.
    """

    counts: tuple[int, ...]
    sent: tuple[int, ...]
    received: tuple[int, ...]
    gathered: tuple[int, ...]
    order_R: Tensor | None

    @property
    def num_sent(self) -> int:
        """Rows that this rank sends."""
        return sum(self.sent)


def own_experts(expert: Axis, num_experts: int) -> range:
    """The experts of this rank, by their numbers."""
    each = num_experts // expert.size
    return range(each * expert.rank, each * (expert.rank + 1))


class RowExchange:
    """The way of rows over the two axes of experts."""

    def __init__(self, expert: Axis, expert_tp: Axis, num_experts: int, replay: Replay) -> None:
        self._expert, self._expert_tp, self._num_experts = expert, expert_tp, num_experts
        self._numbers, self._replay = own_experts(expert, num_experts), replay

    def count(self, counts_E: Tensor, *, expected: int) -> Arrival:
        """How rows come here that are sorted by expert, of which each has `counts_E`; collective, and read back to the
        host. Where memory is counted, and values are not, there are `expected`."""
        return self._replay.run(lambda: self._arrival(counts_E, expected=expected))

    def _arrival(self, counts_E: Tensor, *, expected: int) -> Arrival:
        here_PXL = self._counts_here(counts_E)
        if counts_E.is_meta:
            sent, here = _expected(expected, self._num_experts, self._expert.size, self._expert_tp.size)
        else:
            numbers = torch.cat([counts_E, here_PXL.flatten()]).tolist()
            sent, here = numbers[: self._num_experts], numbers[self._num_experts :]
        ranks, each = self._expert.size, len(self._numbers)
        by_source = [here[first : first + each] for first in range(0, len(here), each)]
        totals = [sum(counts) for counts in by_source]
        mine = self._expert_tp.rank * ranks
        return Arrival(
            counts=tuple(map(sum, zip(*by_source, strict=True))),
            sent=tuple(sum(sent[first : first + each]) for first in range(0, len(sent), each)),
            received=tuple(totals[mine : mine + ranks]),
            gathered=tuple(sum(totals[first : first + ranks]) for first in range(0, len(totals), ranks)),
            order_R=None if len(by_source) == 1 else _by_expert(by_source, counts_E.device),
        )

    def padded(self, rows_each: int, device: torch.device) -> Arrival:
        """How rows come here where each rank sends `rows_each` to every expert: nothing is exchanged or read back."""
        ranks, parts, each = self._expert.size, self._expert_tp.size, len(self._numbers)
        sources = ranks * parts
        order_R = None
        if sources > 1:
            places = torch.arange(sources * each * rows_each, device=device)
            order_R = places.view(sources, each, rows_each).transpose(0, 1).flatten()
        of_rank = (each * rows_each,) * ranks
        return Arrival((rows_each * sources,) * each, of_rank, of_rank, (sum(of_rank),) * parts, order_R)

    def send(self, rows_RH: Tensor, arrival: Arrival) -> Tensor:
        """Rows sorted by expert to those of this rank's experts, sorted by them."""
        rows_RH = typed.all_to_all(
            rows_RH, self._expert, send=arrival.sent, receive=arrival.received, replay=self._replay
        )
        rows_RH = self._over_parts(rows_RH, arrival)
        return rows_RH if arrival.order_R is None else _Permute.apply(rows_RH, arrival.order_R)

    def send_back(self, rows_RH: Tensor, arrival: Arrival) -> Tensor:
        """What this rank's parts of experts give, a partial sum over `expert_tp`, to the ranks of the tokens."""
        if arrival.order_R is not None:
            rows_RH = _Permute.apply(rows_RH, _inverse(arrival.order_R))
        rows_RH = self._sum_of_parts(rows_RH, arrival)
        return typed.all_to_all(rows_RH, self._expert, send=arrival.received, receive=arrival.sent, replay=self._replay)

    def _over_parts(self, rows_RH: Tensor, arrival: Arrival) -> Tensor:
        """V to R: the rows of all ranks of `expert_tp`, one after another. Backward: their sum."""
        ranks = self._expert_tp.size
        if ranks == 1:
            return rows_RH
        own = [rows_RH.shape[0]] * ranks
        return typed.all_to_all(
            rows_RH.repeat(ranks, 1), self._expert_tp, send=own, receive=arrival.gathered, replay=self._replay
        )

    def _sum_of_parts(self, rows_RH: Tensor, arrival: Arrival) -> Tensor:
        """P to V: the sum of the parts of this rank's own rows, in the order of the ranks."""
        ranks = self._expert_tp.size
        if ranks == 1:
            return rows_RH
        own = arrival.gathered[self._expert_tp.rank]
        parts = typed.all_to_all(
            rows_RH, self._expert_tp, send=arrival.gathered, receive=[own] * ranks, replay=self._replay
        )
        return parts.view(ranks, own, rows_RH.shape[1]).sum(0)  # own may be 0

    def _counts_here(self, counts_E: Tensor) -> Tensor:
        """Rows from each rank of both axes for each of this rank's experts, [P, X, L]."""
        sizes = [len(self._numbers)] * self._expert.size
        here_XL = collectives.all_to_all(counts_E, self._expert, send=sizes, receive=sizes)
        return collectives.all_gather(here_XL, self._expert_tp).view(self._expert_tp.size, self._expert.size, -1)


def even_counts(num_rows: int, num_experts: int) -> list[int]:
    """Rows of each expert under an even load."""
    bounds = [num_rows * number // num_experts for number in range(num_experts + 1)]
    return [high - low for low, high in pairwise(bounds)]


def _expected(num_rows: int, num_experts: int, ranks: int, parts: int) -> tuple[list[int], list[int]]:
    """Without values, as where memory is counted, all experts have equally many rows: those that this rank sends to
    each, and those from each rank for each of its own."""
    sent = even_counts(num_rows, num_experts)
    return sent, sent[: num_experts // ranks] * ranks * parts


def _by_expert(by_source: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """For rows by expert, and those of one expert by the rank that they come from, where each came in."""
    counts = [count for source in by_source for count in source]
    starts = [0, *accumulate(counts)]
    each = len(by_source[0])
    stretches = [
        torch.arange(starts[source * each + number], starts[source * each + number + 1])
        for number in range(each)
        for source in range(len(by_source))
    ]
    return on_device(torch.cat(stretches), device)


def _inverse(order_R: Tensor) -> Tensor:
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


class _Permute(torch.autograd.Function):
    """x[order], where every row is taken once."""

    @staticmethod
    def forward(ctx: Any, x_RH: Tensor, order_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return x_RH[order_R]

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        (order_R,) = ctx.saved_tensors
        return grad_RH[_inverse(order_R)], None
