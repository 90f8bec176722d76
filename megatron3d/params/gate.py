"""WeightGate: where a model says that it is about to read some weights, and that it has done so.

A stage names its places (embedding, each layer, head) and opens and closes the gate around each. Unbound, the gate
passes tensors through. Bound to a gatherer that keeps weights elsewhere, the passage is where they come and go:

    forward:   open brings them,  close lets them go
    backward:  close brings them, open lets them go

A table that is cut into blocks (`row_blocks.py`) comes block by block in between, as its layer asks for them.

Both lie inside a recomputed function, so recomputation opens and closes too. A gate is explicit where module hooks
would be hidden, and it is the only thing a model knows of sharded weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron3d.params.row_blocks import BlockedTable


@dataclass(frozen=True)
class WeightUse:
    """One place of a stage: the flat units whose weights its forward reads, and those that its backward reads again
    (a lookup's backward does not read its table)."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]


class WeightGatherer(Protocol):
    """Whoever keeps the weights. `releases` says whether weights go after use, so that backwards must ask again."""

    releases: bool

    def gather_weights(self, place: str, *, backward: bool) -> None:
        """Return when the weights of a place may be read."""
        ...

    def release_weights(self, place: str, *, backward: bool) -> None:
        """The weights of a place have been read."""
        ...

    def blocks_of(self, table: nn.Parameter) -> BlockedTable | None:
        """The weights of a table that comes block by block; None where it comes whole."""
        ...


class WeightGate:
    """The gate of one rank's stages; bound once, after the stages are built."""

    def __init__(self) -> None:
        self._gatherer: WeightGatherer | None = None

    def bind(self, gatherer: WeightGatherer) -> None:
        """Ask `gatherer` from now on."""
        self._gatherer = gatherer

    def open(self, place: str, x: Tensor | None = None) -> Tensor | None:
        """Before the place: its weights may be read from here on. Returns `x`, the place's input.

        None is the input of a place that takes no gradient (the embedding); then the gatherer is not informed that its
        backward is over, and the gatherer releases the weights at the end of the stage's backward.
        """
        if self._gatherer is None:
            return x
        if x is None or not self._gatherer.releases:
            self._gatherer.gather_weights(place, backward=False)
            return x
        return _Open.apply(x, self._gatherer, place)

    def close(self, place: str, x: Tensor) -> Tensor:
        """After the place: its weights are not read any more. Returns `x`, the place's output."""
        if self._gatherer is None or not self._gatherer.releases:
            return x
        return _Close.apply(x, self._gatherer, place)

    @contextmanager
    def reading(self, place: str) -> Iterator[None]:
        """The weights of a place may be read within the context, outside of its forward and its backward: by deferred
        work that computes something again."""
        if self._gatherer is not None:
            self._gatherer.gather_weights(place, backward=False)
        yield
        if self._gatherer is not None and self._gatherer.releases:
            self._gatherer.release_weights(place, backward=False)

    def blocks_of(self, table: nn.Parameter) -> BlockedTable | None:
        """The weights of a table, between the opening and the closing of its place, where they come block by block;
        None where the parameter has them."""
        return None if self._gatherer is None else self._gatherer.blocks_of(table)


class _Open(torch.autograd.Function):
    """The identity; the backward comes here when the backward of the place is over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gatherer: WeightGatherer, place: str) -> Tensor:
        ctx.gatherer, ctx.place = gatherer, place
        gatherer.gather_weights(place, backward=False)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.gatherer.release_weights(ctx.place, backward=True)
        return grad, None, None


class _Close(torch.autograd.Function):
    """The identity; the backward comes here before the backward of the place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gatherer: WeightGatherer, place: str) -> Tensor:
        ctx.gatherer, ctx.place = gatherer, place
        gatherer.release_weights(place, backward=False)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.gatherer.gather_weights(ctx.place, backward=True)
        return grad, None, None
