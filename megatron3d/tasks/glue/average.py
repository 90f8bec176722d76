"""An average of the weights over the steps of a training, which judges better than the weights of any one step.

While the rate is high, weights wander around a point that none of them is at; their mean is nearer to it. Every rank
averages what it holds of the master weights, so the average is sharded as they are and costs no message.

Source: Polyak and Juditsky 1992 (Acceleration of Stochastic Approximation by Averaging); the decay that rises with the
number of steps is that of TensorFlow's `ExponentialMovingAverage`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from megatron3d.tasks.glue import weights
from megatron3d.train.parts import Parts


class WeightAverage:
    """The exponential moving average of this rank's master weights."""

    def __init__(self, parts: Parts, decay: float) -> None:
        """Start at the weights that are in the model.

        Args:
            parts: the rank's model and optimizer.
            decay: what is kept of the average in a step, from 0 (the last weights alone) to below 1.
        """
        self.parts, self.decay = parts, decay
        self.num_steps = 0
        self.means: dict[str, Tensor] = weights.remember(parts)

    def add(self) -> None:
        """Take the weights after one more step in."""
        self.num_steps += 1
        # The first weights are far off, and would stay in a slow average for long.
        kept = min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        with self.parts.engine.states_opened(self.parts.optimizer, writes=False):
            for name, view in self.parts.engine.weight_views().items():
                self.means[name].lerp_(view.data, 1 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the average in the model, and afterwards the weights that were there; collective over all ranks.

        An error ends the run, so a block that raises leaves the average where it is: ranks that have failed would not
        come to a recall for which the others wait.
        """
        own = weights.remember(self.parts)
        weights.recall(self.parts, self.means)
        yield
        weights.recall(self.parts, own)
