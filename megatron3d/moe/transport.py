"""Transports: the ways in which tokens reach the ranks of their experts, and what the experts give comes back.

    alltoall    rows go to the ranks that hold their experts; how many is exchanged first and read back to the host
    allgather   every rank gets the tokens of all and keeps those of its experts; what these give is summed over the
                ranks. For few ranks and many experts of a token: an exchange moves a token once for each rank instead
                of once for each expert

Padded to capacity (--moe-pad-expert-input-to-capacity), every expert gets as many rows as it may take, some of them
zeros. Then all sizes are known beforehand, and neither way exchanges counts or reads one back.

A transport dispatches the tokens of a layer and counts the rows of each expert; the layer computes; what came with the
rows combines the results. Another transport is another class with `dispatch`.

Source: Lepikhin et al. 2020 (GShard), section 3.2; Megatron-LM's `--moe-token-dispatcher-type` for both names.

Shapes: T tokens of this rank, N of all ranks that have the same experts between them, K experts of each, R rows, H
hidden, E experts, L experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron3d.comm import collectives, typed
from megatron3d.config.sections.model import ModelConfig
from megatron3d.moe.capacity import capacity_of
from megatron3d.moe.dispatch import Rows, add_rows, pad_rows, sort_rows, take_rows
from megatron3d.moe.exchange import RowExchange, even_counts, own_experts
from megatron3d.moe.router import Routing, TokenPlaces
from megatron3d.tensor.context import LayerContext


@dataclass(frozen=True)
class Dispatched:
    """The rows of this rank's experts.

    Attributes:
        rows_RH: sorted by expert.
        counts: rows of each expert.
        combine: from what the experts give for these rows, a partial sum over `expert_tp`, to the weighted sum of each
            token of this rank, [T, H].
    """

    rows_RH: Tensor
    counts: tuple[int, ...]
    combine: Callable[[Tensor], Tensor]


class Transport(Protocol):
    """Brings tokens to experts and back."""

    def dispatch(self, x_TH: Tensor, routing: Routing, places: TokenPlaces) -> Dispatched:
        """Send the tokens of this rank, which stand at `places`, to the experts that `routing` says; collective."""
        ...


def transport_of(config: ModelConfig, context: LayerContext, num_experts: int) -> Transport:
    """The transport that the options name, for a layer with `num_experts` experts."""
    kind = {"alltoall": AllToAll, "allgather": AllGather}[config.moe_token_dispatcher_type]
    return kind(config, context, num_experts)


class AllToAll:
    """Rows to the ranks of their experts alone."""

    def __init__(self, config: ModelConfig, context: LayerContext, num_experts: int) -> None:
        self._config, self._num_experts = config, num_experts
        self._exchange = RowExchange(context.expert, context.expert_tp, num_experts, context.replay)

    def dispatch(self, x_TH: Tensor, routing: Routing, places: TokenPlaces) -> Dispatched:
        """A `Transport`."""
        exchange, rows_each = self._exchange, padded_rows(self._config, self._num_experts, places)
        if rows_each is not None:
            rows = pad_rows(routing.expert_TK, self._num_experts, rows_each, routing.kept_TK)
            arrival = exchange.padded(rows_each, x_TH.device)
        else:
            rows = sort_rows(routing.expert_TK, self._num_experts, routing.kept_TK)
            arrival = exchange.count(rows.counts_E, expected=expected_rows(self._config, rows))
            rows = rows.first(arrival.num_sent)

        def combine(done_RH: Tensor) -> Tensor:
            return add_rows(exchange.send_back(done_RH, arrival), routing.weight_TK, rows)

        return Dispatched(exchange.send(take_rows(x_TH, rows), arrival), arrival.counts, combine)


class AllGather:
    """All tokens to all ranks, each of which keeps those of its experts.

    A token's experts on one rank are added up there, and these sums over the ranks, in fp32 at least.
    """

    def __init__(self, config: ModelConfig, context: LayerContext, num_experts: int) -> None:
        self._config, self._context, self._numbers = config, context, own_experts(context.expert, num_experts)
        self._num_experts = num_experts

    def dispatch(self, x_TH: Tensor, routing: Routing, places: TokenPlaces) -> Dispatched:
        """A `Transport`."""
        rows_each = padded_rows(self._config, self._num_experts, places)
        rows, counts = self._context.replay.run(lambda: self._rows_here(routing, rows_each))
        x_NH, weight_NK = self._of_all(x_TH), self._of_all(routing.weight_TK)

        def combine(done_RH: Tensor) -> Tensor:
            wide = torch.promote_types(done_RH.dtype, torch.float32)
            return self._sum_of_all(add_rows(done_RH, weight_NK, rows, dtype=wide)).to(done_RH.dtype)

        return Dispatched(take_rows(x_NH, rows), counts, combine)

    def _rows_here(self, routing: Routing, rows_each: int | None) -> tuple[Rows, tuple[int, ...]]:
        """Which of all tokens are rows of this rank's experts, and how many of each expert."""
        context, here = self._context, len(self._numbers)
        expert_TK, kept_TK = routing.expert_TK, routing.kept_TK
        expert_NK = expert_TK if kept_TK is None else expert_TK.masked_fill(~kept_TK, -1)
        for axis in (context.expert, context.expert_tp):
            expert_NK = collectives.all_gather(expert_NK, axis)
        expert_NK = expert_NK - self._numbers.start
        is_here_NK, own_NK = (expert_NK >= 0) & (expert_NK < here), expert_NK.clamp(0, here - 1)
        if rows_each is not None:
            rows_each *= context.expert.size * context.expert_tp.size
            return pad_rows(own_NK, here, rows_each, is_here_NK), (rows_each,) * here
        rows = sort_rows(own_NK, here, is_here_NK)
        if rows.counts_E.is_meta:
            counts = even_counts(expected_rows(self._config, rows) // context.expert.size, here)
        else:
            counts = rows.counts_E.tolist()
        return rows.first(sum(counts)), tuple(counts)

    def _of_all(self, x: Tensor) -> Tensor:
        """V to R over both axes."""
        for axis in (self._context.expert, self._context.expert_tp):
            x = typed.all_gather(x, axis, dst="R", replay=self._context.replay)
        return x

    def _sum_of_all(self, y_NH: Tensor) -> Tensor:
        """P to V over both axes, the way back of `_of_all`."""
        for axis in (self._context.expert_tp, self._context.expert):
            y_NH = typed.reduce_scatter(y_NH, axis, replay=self._context.replay)
        return y_NH


def padded_rows(config: ModelConfig, num_experts: int, places: TokenPlaces) -> int | None:
    """Rows that each expert gets of a rank's tokens with padding to capacity; None without, and in generation, where no
    expert has a capacity."""
    capacity = capacity_of(config, num_experts, places.length)
    if not config.moe_pad_expert_input_to_capacity or capacity is None or not places.has_capacity:
        return None
    of_sample = places.sample_T.shape[0] // places.num_samples
    return min(capacity, of_sample) * places.num_samples


def expected_rows(config: ModelConfig, rows: Rows) -> int:
    """Rows of choices under an even load."""
    factor = config.moe_expert_capacity_factor
    return int(rows.choice_R.shape[0] * (1 if factor is None else min(1, factor)))
