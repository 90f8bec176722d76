"""Fp8Recipe: how the linear layers of a run compute in fp8; and the weights of a step in fp8, cast once for it.

Weights change between steps alone, so all micro-batches of a step use one cast of each. Outside of a step nothing is
kept, and every use casts again: a cast that outlives its weights cannot occur.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from megatron3d_kernels.fp8 import E4M3
from megatron3d_kernels.fp8_cast import Orientations, Pair
from torch import Tensor, nn

Scaling = Literal["tensorwise", "blockwise"]


class Fp8Weights:
    """The weights of one rank in fp8, in both orientations, while they do not change."""

    def __init__(self, *, keeps: bool = True) -> None:
        """Without `keeps` every use casts again, as weights should that do not stay either."""
        self.keeps = keeps
        self._pairs: dict[nn.Parameter, Pair] | None = None
        self._largest: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Within the context weights do not change, so what is cast is kept."""
        self._pairs = {} if self.keeps else None
        try:
            yield
        finally:
            self._pairs = None
            self._largest.clear()

    def largest(self, weight: nn.Parameter, find: Callable[[], Tensor]) -> Tensor:
        """The largest magnitude of a weight, as bits; `find` looks for it."""
        if self._pairs is None:
            return find()
        if weight not in self._largest:
            self._largest[weight] = find()
        return self._largest[weight]

    def cast(self, weight: nn.Parameter, make: Callable[[Orientations], Pair], wanted: Orientations) -> Pair:
        """A weight in the orientations that are wanted, at least; `make` casts it."""
        if self._pairs is None:
            return make(wanted)
        if weight not in self._pairs:
            self._pairs[weight] = make(Orientations())
        return self._pairs[weight]


@dataclass(frozen=True)
class Fp8Recipe:
    """How linear layers compute in fp8.

    Attributes:
        scaling: "tensorwise" has one scale for a tensor, "blockwise" one for 1 x 128 of inputs and gradients and one
            for 128 x 128 of weights.
        gradient_dtype: of the gradients of outputs; inputs and weights are E4M3.
        casts_weight_gradient: whether weight gradients are products in fp8 too, or in bf16.
        weights: those of a step.
    """

    scaling: Scaling
    gradient_dtype: torch.dtype = E4M3
    casts_weight_gradient: bool = True
    weights: Fp8Weights = field(default_factory=Fp8Weights)
