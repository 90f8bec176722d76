"""A model for generation: weights alone, from a checkpoint of any layout, or those of a model in training.

Neither gradients nor an optimizer nor flat buffers exist here, and sequence parallelism is off: generation reads one
token at a time, which cannot be cut along the sequence.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from megatron3d.checkpoint.load import load_tensors
from megatron3d.comm.mesh import Mesh
from megatron3d.config.derive import complete, derive
from megatron3d.config.rules.bounds import single_option_problems, with_defaults_where_wrong
from megatron3d.config.rules.model import model_and_layout_problems
from megatron3d.config.run import GivenRun, RunConfig
from megatron3d.config.sections.parallel import GivenParallel
from megatron3d.config.sections.train import GivenTrain
from megatron3d.errors import ConfigError
from megatron3d.models.stage import StageBuilder
from megatron3d.models.zoo import architecture_of
from megatron3d.params.boxes import ShardView
from megatron3d.params.module import Declared, declared_states
from megatron3d.train.module_states import ModuleStates
from megatron3d.train.setup import Model, build_model
from megatron3d.zero.kinds import KINDS


def generation_config(stored: RunConfig, parallel: GivenParallel, *, world_size: int, bf16: bool) -> RunConfig:
    """The run of a checkpoint as it is used for generation: its model at another layout and precision.

    Args:
        stored: the run that wrote the checkpoint.
        parallel: the layout wanted.
        world_size: number of ranks.
        bf16: compute in bf16 instead of fp32.

    Raises:
        ConfigError: the model cannot be cut that way, with all problems.
    """
    wanted = GivenRun(
        model=stored.model,
        parallel=parallel,
        optim=replace(stored.optim, bf16=bf16, fp16=False),
        data=stored.data,
        train=GivenTrain(micro_batch_size=1),
    )
    given = with_defaults_where_wrong(wanted)
    run = derive(given, world_size)
    problems = [*single_option_problems(wanted), *model_and_layout_problems(given, run)]
    if problems:
        raise ConfigError("\n".join(problems))
    return complete(run)


def load_model(
    config: RunConfig, mesh: Mesh, device: torch.device, directory: Path, *, builder: StageBuilder | None = None
) -> Model:
    """This rank's stages with the weights of a checkpoint; collective over all ranks.

    Args:
        config: from `generation_config`.
        mesh: the live layout.
        device: where the weights go.
        directory: the checkpoint itself (see `checkpoint.directory.find_checkpoint`).
        builder: makes the stages, by default those of pretraining; heads that it does not declare are not read.

    Raises:
        CheckpointError: it is damaged or holds another model.
    """
    model, views = allocate_model(config, mesh, device, builder or architecture_of(config.model).build_stage)
    states = declared_states(model.stages.values())
    may_be_missing = {f"model/{name}" for name, one in states.items() if one.spec.may_be_missing}
    load_tensors(
        directory,
        {f"model/{name}": view for name, view in views.items()},
        group=mesh.world.group,
        may_be_left=lambda name: not name.startswith("model/") or name.startswith("model/head."),
        may_be_missing=may_be_missing.__contains__,
    )
    return model


def allocate_model(
    config: RunConfig, mesh: Mesh, device: torch.device, builder: StageBuilder
) -> tuple[Model, dict[str, ShardView]]:
    """This rank's stages with weights that are all zeros, and what of each is to be filled, by name."""
    model = build_model(config, mesh, device, builder)
    views = {
        name: _allocate(declared, mesh, device, model.dtype)
        for stage in model.stages.values()
        for name, declared in stage.parameters_by_name().items()
    }
    states = ModuleStates(model.stages.values(), mesh, device, seed=config.data.seed)
    return model, views | states.views()


def _allocate(declared: Declared, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> ShardView:
    """Give a declared parameter memory, all zeros; returns what of it a checkpoint fills."""
    spec, tp = declared.spec, mesh.axis(KINDS[declared.spec.kind].tensor)
    values = torch.zeros(spec.local_shape(tp.size), dtype=dtype, device=device)
    declared.owner.register_parameter(declared.attribute, nn.Parameter(values, requires_grad=False))
    boxes, covered = spec.boxes(tp.size, tp.rank, 0, values.numel())
    return ShardView(spec.shape, boxes, values.view(-1)[:covered])


def without_sequence_parallelism(model: Model, config: RunConfig) -> tuple[Model, RunConfig]:
    """The same weights in layers that keep the whole sequence on every rank; as given where they do so already."""
    if not config.parallel.sequence_parallel:
        return model, config
    config = replace(config, parallel=replace(config.parallel, sequence_parallel=False))
    twin = build_model(config, model.mesh, model.device, architecture_of(config.model).build_stage)
    for number, stage in twin.stages.items():
        trained = model.stages[number].parameters_by_name()
        for name, declared in stage.parameters_by_name().items():
            declared.owner.register_parameter(declared.attribute, trained[name].parameter)
        states = declared_states([model.stages[number]])
        for name, one in declared_states([stage]).items():
            value = states[name].owner.get_buffer(one.attribute)
            one.owner.register_buffer(one.attribute, value, persistent=False)
    return twin, config
