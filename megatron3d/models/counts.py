"""How many parameters a model has: those that its layers declare, whatever the model; nothing is allocated."""

from __future__ import annotations

from functools import lru_cache

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.stage import whole_stage
from megatron3d.models.zoo import architecture_of
from megatron3d.params.spec import ParamSpec


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model with its true vocabulary, a tied embedding counted once."""
    return sum(spec.numel for spec in declared_specs(model))


@lru_cache(maxsize=64)  # a model of a hundred layers takes a tenth of a second, and reports ask after every step
def declared_specs(model: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter that the layers of a resolved model declare, each once."""
    train = TrainConfig(micro_batch_size=1, global_batch_size=1)  # no parameter depends on the batch
    stage = whole_stage(model, train, architecture_of(model).build_stage)
    return tuple(declared.spec for declared in stage.parameters_by_name().values())
