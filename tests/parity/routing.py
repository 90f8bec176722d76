"""Routing recorded in one process and replayed elsewhere.

The K largest of some numbers jump where two of them are nearly equal, and rounding depends on the layout. So a run of
another layout may send a token elsewhere, and from then on it is another run. With the choice of the reference it is
the same run, in everything but rounding. A choice is known by the key of its token, which is a function of step, layer,
sample and position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from megatron3d.moe.router import Router, TokenPlaces


@dataclass
class Choices:
    """The experts of tokens by their keys: int64 [N] in ascending order, and [N, K]."""

    keys_N: Tensor
    experts_NK: Tensor

    def of(self, keys_T: Tensor) -> Tensor:
        """The experts of these tokens, [T, K]."""
        at = torch.searchsorted(self.keys_N, keys_T)
        assert torch.equal(self.keys_N[at], keys_T), "a token that the reference has not seen"
        return self.experts_NK[at]


@dataclass
class Recording:
    """What routers choose while it is recorded."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def choices(self) -> Choices:
        """All of it."""
        keys = torch.cat([keys for keys, _ in self.seen])
        order = keys.argsort()
        return Choices(keys[order], torch.cat([experts for _, experts in self.seen])[order])


@contextmanager
def recording() -> Iterator[Recording]:
    """Record what routers of training steps choose within the context."""
    record, choose = Recording(), Router.choose

    def choose_and_record(self: Router, selection_TE: Tensor, places: TokenPlaces) -> Tensor:
        chosen = choose(self, selection_TE, places)
        if places.keys is not None:
            record.seen.append((places.keys(), chosen))
        return chosen

    with mock.patch.object(Router, "choose", choose_and_record):
        yield record


@contextmanager
def replaying(choices: Choices) -> Iterator[None]:
    """Let routers choose what was recorded; what fills up a shard, and is no token, passes the first experts."""

    def replay(self: Router, selection_TE: Tensor, places: TokenPlaces) -> Tensor:
        assert places.keys is not None, "only training steps are recorded"
        keys_T = places.keys()
        if places.valid_T is None:
            return choices.of(keys_T)
        chosen = torch.arange(choices.experts_NK.shape[1]).repeat(len(keys_T), 1)
        chosen[places.valid_T] = choices.of(keys_T[places.valid_T])
        return chosen

    with mock.patch.object(Router, "choose", replay):
        yield


@contextmanager
def to_the_first() -> Iterator[None]:
    """Let every token choose the first experts, which one rank holds where experts are sharded."""

    def choose(self: Router, selection_TE: Tensor, places: TokenPlaces) -> Tensor:
        return torch.arange(self.config.moe_router_topk).repeat(selection_TE.shape[0], 1)

    with mock.patch.object(Router, "choose", choose):
        yield
