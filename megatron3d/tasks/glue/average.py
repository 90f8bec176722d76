"""An average of the weights over the steps of a training, which judges better than the weights of any one step.

While the rate is high, weights wander around a point that none of them is at; their mean is nearer to it. The average
is state beside each parameter that trains: every rank averages what it holds of the master weights, so it is sharded
as they are and costs no message.

Source: Polyak and Juditsky 1992 (Acceleration of Stochastic Approximation by Averaging); the decay that rises with the
number of steps is that of TensorFlow's `ExponentialMovingAverage`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.stage import Stage, StageBuilder, StagePart
from megatron3d.params.module import declared_parameters
from megatron3d.tasks.glue import weights
from megatron3d.tensor.context import LayerContext
from megatron3d.train.setup import TrainingSetup

AVERAGE = "average"


def declare_averages(root: nn.Module) -> None:
    """A pass that declares an average beside each parameter below `root` that trains."""
    for one in declared_parameters(root).values():
        if one.spec.trains:
            one.owner.declare_state(AVERAGE, one.spec.shape, torch.float32, beside=one.attribute)


def with_averages(builder: StageBuilder) -> StageBuilder:
    """A builder of the same stages with averages declared."""

    def build(config: ModelConfig, train: TrainConfig, part: StagePart, context: LayerContext) -> Stage:
        stage = builder(config, train, part, context)
        declare_averages(stage)
        return stage

    return build


class WeightAverage:
    """The exponential moving average of this rank's master weights."""

    def __init__(self, parts: TrainingSetup, decay: float, *, num_steps: int = 0) -> None:
        """Start at the weights that are in the model, or go on with the average that a checkpoint has.

        Args:
            parts: the rank's model, with averages declared, and its optimizer.
            decay: what is kept of the average in a step, from 0 (the last weights alone) to below 1.
            num_steps: steps that are in the average already; 0 starts it.
        """
        self.parts, self.decay = parts, decay
        self.num_steps = num_steps
        if num_steps == 0:
            self._take_in(1.0)

    def add(self) -> None:
        """Take the weights after one more step in."""
        self.num_steps += 1
        # The first weights are far off, and would stay in a slow average for long.
        self._take_in(1 - min(self.decay, (1 + self.num_steps) / (10 + self.num_steps)))

    def _take_in(self, share: float) -> None:
        with self.parts.engine.states_opened(self.parts.optimizer, writes=False):
            for unit in self.parts.engine.trained.values():
                unit.beside[AVERAGE].lerp_(unit.master, share)

    def means(self) -> dict[str, Tensor]:
        """This rank's part of the average, by full name of the parameters; live memory."""
        views = self.parts.engine.beside_views().items()
        return {name.removeprefix(f"{AVERAGE}/"): view.data for name, view in views if name.startswith(f"{AVERAGE}/")}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the average in the model, and afterwards the weights that were there; collective over all ranks.

        An error ends the run, so a block that raises leaves the average where it is: ranks that have failed would not
        come to a `restore` for which the others wait.
        """
        own = weights.remember(self.parts)
        weights.restore(self.parts, self.means())
        yield
        weights.restore(self.parts, own)
