"""One run, whole: the config sections together."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron3d.config.sections.checkpoint import CheckpointConfig
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.optim import OptimConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.sections.train import TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything a user decided. Functions take the smallest section they need, not this."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
