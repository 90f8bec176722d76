"""Routing recorded in one process and replayed elsewhere.

The K largest of some numbers jump where two of them are nearly equal, and rounding depends on the layout. So a run of
another layout may send a token elsewhere, and from then on it is another run. With the choice of the reference, and
what its capacities keep, it is the same run in everything but rounding. A choice is known by the key of its token,
which is a function of step, layer, sample and position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from megatron3d.config.sections.model import ModelConfig
from megatron3d.moe.router import Router, TokenPlaces, in_best_groups


@dataclass
class Choices:
    """The experts of tokens by their keys: int64 [N] in ascending order, and [N, K], with whether each is kept."""

    keys_N: Tensor
    experts_NK: Tensor
    kept_NK: Tensor

    def at(self, keys_T: Tensor) -> Tensor:
        """Where these tokens stand."""
        at = torch.searchsorted(self.keys_N, keys_T)
        assert torch.equal(self.keys_N[at], keys_T), "a token that the reference has not seen"
        return at


@dataclass
class Recording:
    """What routers choose and keep while it is recorded."""

    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def choices(self) -> Choices:
        """All of it."""
        keys, experts, kept = (torch.cat(one) for one in zip(*self.seen, strict=True))
        order = keys.argsort()
        return Choices(keys[order], experts[order], kept[order])


@contextmanager
def recording() -> Iterator[Recording]:
    """Record what routers of training steps choose and keep within the context."""
    record, keep = Recording(), Router.keep

    def keep_and_record(self: Router, expert_TK: Tensor, weight_TK: Tensor, places: TokenPlaces) -> Tensor | None:
        kept = keep(self, expert_TK, weight_TK, places)
        if places.keys is not None:
            all_kept = torch.ones_like(expert_TK, dtype=torch.bool)
            record.seen.append((places.keys(), expert_TK, all_kept if kept is None else kept))
        return kept

    with mock.patch.object(Router, "keep", keep_and_record):
        yield record


@contextmanager
def replaying(choices: Choices) -> Iterator[None]:
    """Let routers choose and keep what was recorded; what fills up a shard, and is no token, chooses the first experts
    and is not kept."""

    def replay(self: Router, selection_TE: Tensor, places: TokenPlaces) -> Tensor:
        first = torch.arange(choices.experts_NK.shape[1])
        return _of_tokens(choices, choices.experts_NK, first, places)

    keep_freely = Router.keep

    def keep(self: Router, expert_TK: Tensor, weight_TK: Tensor, places: TokenPlaces) -> Tensor:
        kept_TK = _of_tokens(choices, choices.kept_NK, torch.zeros(choices.kept_NK.shape[1], dtype=torch.bool), places)
        if self.config.moe_token_drop_policy == "random":  # which depends on no rounding
            free_TK = keep_freely(self, expert_TK, weight_TK, places)
            assert free_TK is not None and torch.equal(free_TK, kept_TK), "another layout keeps other tokens"
        return kept_TK

    with mock.patch.object(Router, "choose", replay), mock.patch.object(Router, "keep", keep):
        yield


def _of_tokens(choices: Choices, values_NK: Tensor, others_K: Tensor, places: TokenPlaces) -> Tensor:
    """The values of a rank's tokens, [T, K], with `others_K` where no token stands."""
    assert places.keys is not None, "only training steps are recorded"
    keys_T, valid_T = places.keys(), places.valid_T
    if valid_T is None:
        return values_NK[choices.at(keys_T)]
    values_TK = others_K.repeat(len(keys_T), 1)
    values_TK[valid_T] = values_NK[choices.at(keys_T[valid_T])]
    return values_TK


@contextmanager
def noting_flips(choices: Choices) -> Iterator[list[float]]:
    """Let routers choose freely, and note each token that goes elsewhere than was recorded, with its margin."""
    margins: list[float] = []
    choose = Router.choose

    def choose_and_compare(self: Router, selection_TE: Tensor, places: TokenPlaces) -> Tensor:
        chosen_TK = choose(self, selection_TE, places)
        assert places.keys is not None, "only training steps are recorded"
        flipped_T = (chosen_TK != choices.experts_NK[choices.at(places.keys())]).any(1)
        margins.extend(margins_of(self.config, selection_TE)[flipped_T].tolist())
        return chosen_TK

    with mock.patch.object(Router, "choose", choose_and_compare):
        yield margins


def margins_of(config: ModelConfig, selection_TE: Tensor) -> Tensor:
    """By how much the last of each token's experts is ahead of the next, or the last of its groups of the next."""
    chosen, groups, best = config.moe_router_topk, config.moe_router_num_groups, config.moe_router_group_topk
    margin_T = torch.full((selection_TE.shape[0],), torch.inf)
    if groups is not None and best is not None:
        largest = selection_TE.unflatten(-1, (groups, -1)).topk(chosen // best, dim=-1).values
        margin_T = _lead(largest.sum(-1), best)
        selection_TE = in_best_groups(selection_TE, num_groups=groups, best=best, num_chosen=chosen)
    return torch.minimum(margin_T, _lead(selection_TE, chosen))


def _lead(values_TX: Tensor, number: int) -> Tensor:
    ranked_TX = values_TX.sort(descending=True).values
    return ranked_TX[:, number - 1] - ranked_TX[:, number]


@contextmanager
def to_the_first() -> Iterator[None]:
    """Let every token choose the first experts, which one rank holds where experts are sharded."""

    def choose(self: Router, selection_TE: Tensor, places: TokenPlaces) -> Tensor:
        return torch.arange(self.config.moe_router_topk).repeat(selection_TE.shape[0], 1)

    with mock.patch.object(Router, "choose", choose):
        yield
