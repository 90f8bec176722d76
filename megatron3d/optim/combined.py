"""Several optimizers as one: each updates its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron3d.optim.flat import EagerOptimizer


class CombinedOptimizer(EagerOptimizer):
    """One optimizer whose groups and states are those of others, which make its steps."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        super().__init__([group for one in self.optimizers for group in one.param_groups], {})
        for one in self.optimizers:
            self.state.update(one.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step with each; a closure is not taken."""
        assert closure is None, f"{type(self).__name__} evaluates no closure"
        for one in self.optimizers:
            one.step()
