"""How many parameters a model has: those that its layers declare, whatever the model; nothing is allocated."""

from __future__ import annotations

from functools import lru_cache, partial

from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.models.stage import StageBuilder, whole_stage
from megatron3d.models.zoo import architecture_of
from megatron3d.params.spec import ParamSpec


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model with its true vocabulary, a tied embedding counted once."""
    return sum(spec.numel for spec in declared_specs(model))


def num_active_parameters(model: ModelConfig) -> int:
    """Those that one token passes: of the experts of a layer the K that it chooses."""
    return round(sum(spec.numel * active_share(model, spec) for spec in declared_specs(model)))


def active_share(model: ModelConfig, spec: ParamSpec) -> float:
    """The share of tokens that pass a parameter: K of its layer's E for those of experts, else all."""
    if spec.kind != "expert":
        return 1.0
    return model.moe_router_topk / model.experts_of(int(spec.name.split(".")[1]))


def is_router(spec: ParamSpec) -> bool:
    """Whether it is the matrix that scores experts, or the gate of a shared one: a product in every layer that has it,
    though no linear map of hidden vectors."""
    return spec.name.startswith("layers.") and spec.is_table


@lru_cache(maxsize=64)  # a model of a hundred layers takes a tenth of a second, and reports ask after every step
def declared_specs(model: ModelConfig, frozen: tuple[str, ...] = ()) -> tuple[ParamSpec, ...]:
    """Every parameter that the layers of a resolved model declare, each once, in the order of the layers; those that a
    pattern of `frozen` matches do not train."""
    return _specs_of(model, frozen, architecture_of(model).build_stage)


def classifier_specs(model: ModelConfig, num_outputs: int, frozen: tuple[str, ...] = ()) -> tuple[ParamSpec, ...]:
    """The same of the model's classifier, which scores whole texts."""
    build = architecture_of(model).build_classifier
    assert build is not None, f"{model.architecture} has no classifier"
    return _specs_of(model, frozen, partial(build, num_outputs=num_outputs))


def _specs_of(model: ModelConfig, frozen: tuple[str, ...], build: StageBuilder) -> tuple[ParamSpec, ...]:
    # No parameter depends on the batch.
    train = TrainConfig(micro_batch_size=1, global_batch_size=1, freeze_params=frozen)
    return tuple(declared.spec for declared in whole_stage(model, train, build).parameters_by_name().values())
