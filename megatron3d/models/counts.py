"""How many parameters a model has: those that its layers declare, whatever the model; nothing is allocated."""

from __future__ import annotations

from functools import lru_cache

from megatron3d.config.derive import resolve_model
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.errors import ConfigError
from megatron3d.models.stage import whole_stage
from megatron3d.models.zoo import architecture_of
from megatron3d.params.spec import ParamSpec


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model with its true vocabulary, a tied embedding counted once.

    Raises: ConfigError if the vocabulary or another size is not known.
    """
    return sum(spec.numel for spec in declared_specs(with_all_sizes(model)))


def with_all_sizes(model: ModelConfig) -> ModelConfig:
    """The resolved model.

    Raises: ConfigError if the vocabulary or another size is not known.
    """
    model = resolve_model(model)
    sizes = {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--seq-length": model.seq_length,
        "--vocab-size": model.vocab_size,
    }
    missing = [flag for flag, value in sizes.items() if value is None]
    if missing:
        raise ConfigError(f"The size of the model needs {', '.join(missing)}, which is not known yet; give it first.")
    return model


@lru_cache(maxsize=64)  # a model of a hundred layers takes a tenth of a second, and reports ask after every step
def declared_specs(model: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter that the layers of a resolved model declare, each once."""
    stage = whole_stage(model, TrainConfig(), architecture_of(model).build_stage)
    return tuple(declared.spec for declared in stage.parameters_by_name().values())
