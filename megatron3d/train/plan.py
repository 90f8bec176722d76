"""From the options of a run to its `PipelinePlan`: the order of work, the stages of a rank, the layers of a stage.

Everything here is arithmetic on the config, so a plan that cannot work is refused before a device is touched.
"""

from __future__ import annotations

from megatron3d.comm.device import likely_device_type
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.errors import ConfigError
from megatron3d.models.flops import forward_flops_by_layer
from megatron3d.pipeline.orders.choose import OrderChoice, choose
from megatron3d.pipeline.orders.named import placement_of, virtual_of
from megatron3d.pipeline.plan import PipelinePlan
from megatron3d.pipeline.simulate import Costs, Timeline
from megatron3d.pipeline.split.costs import split_by_costs, stage_loads
from megatron3d.pipeline.split.layout import expand_layout, split_by_layout
from megatron3d.pipeline.split.stages import split_layers
from megatron3d.planner.ledger import first_microbatches, ledger_of, worst
from megatron3d.planner.stage_records import StageRecords

GIB = 2**30
# Numbers of stages per rank that the automatic choice looks at; more make messages small and gain little.
AUTO_VIRTUAL_STAGES = (1, 2, 4)


def plan_of(config: RunConfig) -> PipelinePlan:
    """How a resolved run is cut along its depth; the same on every rank.

    Raises:
        ConfigError: the layers cannot be split as asked.
        ScheduleError: the order is not known or does not take this number of stages per rank.
    """
    parallel = config.parallel
    ranks = parallel.pipeline_model_parallel_size
    order, virtual = _order_and_stages(parallel)
    if order != "auto":
        return _plan(config, order, virtual or virtual_of(order) or 1)
    if ranks == 1 and (virtual or 1) == 1:
        return _plan(config, "1f1b", 1)
    choice = _choose(config, virtual)
    return _plan(config, choice.name, choice.virtual, why=_reason(choice))


def _plan(config: RunConfig, order: str, virtual: int, *, why: str = "") -> PipelinePlan:
    """The plan of an order with so many stages per rank."""
    parallel = config.parallel
    ranks = parallel.pipeline_model_parallel_size
    return PipelinePlan(
        order=order,
        num_ranks=ranks,
        virtual=virtual,
        stage_to_rank=placement_of(order, num_ranks=ranks, virtual=virtual),
        layers=split_of(config.model, parallel, ranks * virtual),
        group_size=parallel.microbatch_group_size_per_virtual_pipeline_stage if order == "interleaved" else None,
        why=why,
    )


def split_of(model: ModelConfig, parallel: ParallelConfig, num_stages: int) -> tuple[range, ...]:
    """The layers of each of `num_stages` stages: as written, by cost, or evenly but for what the ends are given.

    Raises:
        ConfigError: the layers cannot be split as asked.
    """
    if parallel.pipeline_model_parallel_layout is not None:
        return split_by_layout(parallel.pipeline_model_parallel_layout, model.num_layers, num_stages)
    if parallel.pipeline_split_costs is not None:
        costs = _layer_costs(model, parallel.pipeline_split_costs)
        return split_by_costs(costs[1:-1], costs[0], costs[-1], num_stages)
    return split_layers(
        model.num_layers,
        num_stages,
        first=parallel.decoder_first_pipeline_num_layers,
        last=parallel.decoder_last_pipeline_num_layers,
        count_embedding=parallel.account_for_embedding_in_pipeline_split,
        count_loss=parallel.account_for_loss_in_pipeline_split,
    )


def _order_and_stages(parallel: ParallelConfig) -> tuple[str, int | None]:
    """The name of the order, or "auto", and how many stages a rank has where an option says so."""
    virtual, layout = parallel.virtual_stages, parallel.pipeline_model_parallel_layout
    if virtual is None and layout is not None:
        num_stages = expand_layout(layout).count("|") + 1
        virtual = max(1, num_stages // parallel.pipeline_model_parallel_size)
    order = parallel.pipeline_schedule or ("interleaved" if (virtual or 1) > 1 else "1f1b")
    return order, virtual


def _choose(config: RunConfig, virtual: int | None) -> OrderChoice:
    """The shortest order, by the operations of each stage, of those whose predicted memory is within the limit."""
    ranks, layers = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    virtuals = [virtual] if virtual is not None else [v for v in AUTO_VIRTUAL_STAGES if v == 1 or ranks * v <= layers]
    limit_gb = config.parallel.pipeline_memory_limit_gb
    records = StageRecords(config, likely_device_type(config.parallel.device))

    def fits(timeline: Timeline) -> bool:
        if limit_gb is None:
            return True
        schedule = timeline.schedule
        plan = _plan(config, schedule.name, schedule.num_stages // ranks)
        return worst(ledger_of(records, plan)).peak <= limit_gb * GIB

    def costs_of(virtual: int) -> Costs:
        costs, head = forward_flops_by_layer(config.model)
        loads = stage_loads(split_of(config.model, config.parallel, ranks * virtual), costs, 0.0, head)
        mean = sum(loads) / ranks
        # A stage without any layer still takes some time.
        return Costs(stage_factors=tuple(max(load / mean, 1e-3) for load in loads))

    return choose(ranks, first_microbatches(config.train, config.parallel.data_parallel_size), virtuals, costs_of, fits)


def _reason(choice: OrderChoice) -> str:
    """How the automatic choice came about, in words."""
    chosen = next(one for one in choice.considered if (one.name, one.virtual) == (choice.name, choice.virtual))
    dropped = sum(1 for one in choice.considered if one.dropped)
    left_out = f", {dropped} of them over the memory limit" if dropped else ""
    return f"the shortest of {len(choice.considered)} simulated{left_out}, bubble {chosen.bubble:.1%}"


def _layer_costs(model: ModelConfig, given: str) -> tuple[float, ...]:
    """The cost of the embedding, of each layer, and of the output layer with the loss."""
    num_layers = model.num_layers
    if given == "formula":
        layers, head = forward_flops_by_layer(model)
        return (0.0, *layers, head)
    try:
        costs = tuple(float(word) for word in given.split(","))
    except ValueError:
        costs = ()
    if len(costs) != num_layers + 2 or not all(0.0 <= cost < float("inf") for cost in costs):
        raise ConfigError(
            f"--pipeline-split-costs {given} is neither 'formula' nor {num_layers + 2} numbers of at least 0 "
            f"separated by commas: the cost of the embedding, of each of the {num_layers} layers, and of the output "
            "layer"
        )
    return costs
