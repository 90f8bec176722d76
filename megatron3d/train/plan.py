"""From the options of a run to its `PipelinePlan`: the order of work, the stages of a rank, the layers of a stage.

Everything here is arithmetic on the config, so a plan that cannot work is refused before a device is touched.
"""

from __future__ import annotations

from megatron3d.config.parallel import ParallelConfig
from megatron3d.config.run import RunConfig
from megatron3d.errors import ConfigError
from megatron3d.models.flops import forward_flops_by_layer
from megatron3d.models.stage import StagePart
from megatron3d.pipeline.orders import placement_of, virtual_of
from megatron3d.pipeline.plan import PipelinePlan
from megatron3d.pipeline.split import split_layers
from megatron3d.pipeline.split_costs import split_by_costs
from megatron3d.pipeline.split_layout import expand_layout, split_by_layout


def plan_of(config: RunConfig) -> PipelinePlan:
    """How a resolved run is cut along its depth; the same on every rank.

    Raises:
        ConfigError: the layers cannot be split as asked.
        ScheduleError: the order is not known or does not take this number of stages per rank.
    """
    parallel = config.parallel
    ranks = parallel.pipeline_model_parallel_size
    order, virtual = _order_and_stages(parallel)
    return PipelinePlan(
        order=order,
        num_ranks=ranks,
        virtual=virtual,
        stage_to_rank=placement_of(order, num_ranks=ranks, virtual=virtual),
        layers=split_of(config, ranks * virtual),
        group_size=parallel.microbatch_group_size_per_virtual_pipeline_stage if order == "interleaved" else None,
    )


def stage_part(plan: PipelinePlan, stage: int) -> StagePart:
    """The share of the model that a stage of the plan holds."""
    return StagePart(plan.layers[stage], is_first=stage == 0, is_last=stage == plan.num_stages - 1)


def split_of(config: RunConfig, num_stages: int) -> tuple[range, ...]:
    """The layers of each of `num_stages` stages: as written, by cost, or evenly but for what the ends are given.

    Raises:
        ConfigError: the layers cannot be split as asked.
    """
    model, parallel = config.model, config.parallel
    if parallel.pipeline_model_parallel_layout is not None:
        return split_by_layout(parallel.pipeline_model_parallel_layout, model.num_layers, num_stages)
    if parallel.pipeline_split_costs is not None:
        costs = _layer_costs(config, parallel.pipeline_split_costs)
        return split_by_costs(costs[1:-1], costs[0], costs[-1], num_stages)
    return split_layers(
        model.num_layers,
        num_stages,
        first=parallel.decoder_first_pipeline_num_layers,
        last=parallel.decoder_last_pipeline_num_layers,
        count_embedding=parallel.account_for_embedding_in_pipeline_split,
        count_loss=parallel.account_for_loss_in_pipeline_split,
    )


def _order_and_stages(parallel: ParallelConfig) -> tuple[str, int]:
    """The name of the order, and how many stages a rank has."""
    virtual, layout = parallel.virtual_stages, parallel.pipeline_model_parallel_layout
    if virtual is None and layout is not None:
        num_stages = expand_layout(layout).count("|") + 1
        virtual = max(1, num_stages // parallel.pipeline_model_parallel_size)
    order = parallel.pipeline_schedule or ("interleaved" if (virtual or 1) > 1 else "1f1b")
    return order, virtual or virtual_of(order) or 1


def _layer_costs(config: RunConfig, wish: str) -> tuple[float, ...]:
    """The cost of the embedding, of each layer, and of the output layer with the loss."""
    num_layers = config.model.num_layers
    if wish == "formula":
        layer, head = forward_flops_by_layer(config.model)
        return (0.0, *[layer] * num_layers, head)
    try:
        costs = tuple(float(word) for word in wish.split(","))
    except ValueError:
        costs = ()
    if len(costs) != num_layers + 2 or not all(0.0 <= cost < float("inf") for cost in costs):
        raise ConfigError(
            f"--pipeline-split-costs {wish} is neither 'formula' nor {num_layers + 2} numbers of at least 0 "
            f"separated by commas: the cost of the embedding, of each of the {num_layers} layers, and of the output "
            "layer"
        )
    return costs
