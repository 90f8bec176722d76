"""A GPT for tests, two of whose blocks add a loss of their own: the squared log-sum-exp of what they give.

The penalty is declared like any loss of a model, and measured: a hit is a position whose penalty is small.

Shapes: S sequence (local under sequence parallelism), B micro-batch, H hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.gpt import LOSSES, build_gpt_stage
from megatron3d.models.stage import Stage, StagePart
from megatron3d.nn.loss_sink import LossSpec
from megatron3d.tensor.context import LayerContext

LAYERS = ("0", "2")  # of four: one on each rank of a pipeline of two, whichever the order
WEIGHT = 0.03
SMALL = 12.0  # a mean penalty is about 12.1 where training begins
PENALTY = LossSpec(
    "penalty", "squared log-sum-exp of hidden values", "positions", weight=WEIGHT, accuracy="small_penalty_share"
)


def penalties_of(y_SBH: Tensor) -> Tensor:
    """The penalty of each position, [S, B]."""
    return y_SBH.float().logsumexp(-1).square()


def build_penalised_stage(config: ModelConfig, train: TrainConfig, part: StagePart, context: LayerContext) -> Stage:
    """A stage of a GPT whose blocks of `LAYERS` add to the penalty."""

    def penalise(block: nn.Module, args: tuple[Any, ...], y_SBH: Tensor) -> Tensor:
        losses = args[1].losses
        if losses is None:
            return y_SBH
        found_SB = penalties_of(y_SBH)
        over_tp = context.residual_gradient
        if losses.counts_hits:
            losses.add_hits("penalty", (found_SB < SMALL).float().sum(), over_tp=over_tp)
        return losses.add(y_SBH, "penalty", found_SB.sum(), over_tp=over_tp)

    stage = build_gpt_stage(config, train, part, context)
    stage.losses = (*LOSSES, PENALTY)
    for name in LAYERS:
        if name in stage.layers:
            stage.layers[name].register_forward_hook(penalise)
    return stage
