"""Asking a stage for losses, as a training step does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from megatron3d.models.stage import MicroBatch, Stage
from megatron3d.nn.loss_sink import LossSink


def asking_for_losses(
    stage: Stage,
    micro: MicroBatch,
    *,
    gradients: Mapping[str, float] | None = None,
    tp_rank: int = 0,
    counts_hits: bool = False,
) -> tuple[MicroBatch, LossSink]:
    """The micro-batch with a sink for the losses of the stage's model, and the sink; their gradients are 1 where none
    are given."""
    wanted = {spec.name: 1.0 for spec in stage.losses} if gradients is None else gradients
    device = torch.device("cpu")
    sink = LossSink(stage.losses, tp_rank=tp_rank, device=device, gradients=wanted, counts_hits=counts_hits)
    return replace(micro, losses=sink), sink
