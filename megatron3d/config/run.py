"""The configuration of a run, all sections together, in three stages: given, draft and resolved.

Each type is a subclass of the one before it with fewer values that may be None. A function that takes a given run
therefore takes a resolved one too, and resolving twice gives the same as once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron3d.config.sections.checkpoint import CheckpointConfig
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.data_efficiency import CurriculumConfig
from megatron3d.config.sections.lengths import LengthConfig
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.config.sections.optim import GivenOptim, OptimConfig
from megatron3d.config.sections.parallel import GivenParallel, ParallelConfig
from megatron3d.config.sections.train import DraftTrain, GivenTrain, TrainConfig


@dataclass(frozen=True)
class GivenRun:
    """What the user gave, by command line, files and presets. None means that an option was not given."""

    model: GivenModel = field(default_factory=GivenModel)
    parallel: GivenParallel = field(default_factory=GivenParallel)
    optim: GivenOptim = field(default_factory=GivenOptim)
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    train: GivenTrain = field(default_factory=GivenTrain)
    lengths: LengthConfig = field(default_factory=LengthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class DraftRun(GivenRun):
    """What was given and what follows from it on a number of ranks. What cannot be derived is None.

    The rules judge it, complete or not; of one that they accept, at most the size of the vocabulary is open.

    Attributes:
        as_given: of the options whose value here follows from others, by (section, field), what was given: mostly
            None. Two runs that compute the same are equal whichever of their values were given.
    """

    parallel: ParallelConfig = field(kw_only=True)
    train: DraftTrain = field(kw_only=True)
    as_given: Mapping[tuple[str, str], Any] = field(default_factory=dict, compare=False, kw_only=True)


@dataclass(frozen=True)
class RunConfig(DraftRun):
    """Everything that is decided for a run. Functions take the smallest section they need, not this."""

    model: ModelConfig = field(kw_only=True)
    optim: OptimConfig = field(kw_only=True)
    train: TrainConfig = field(kw_only=True)
