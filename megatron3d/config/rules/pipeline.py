"""What must hold between the options that cut the model along its depth. Each rule yields sentences, as in
`rules/model.py`; what only the finished plan shows (a written layout that does not fit, say) is refused by
`train.plan`, still before a device is touched.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.sections.parallel import PIPELINE_SCHEDULES, GivenParallel, ParallelConfig


def pipeline_problems(given: GivenParallel, parallel: ParallelConfig, layers: int | None) -> Iterator[str]:
    """Conflicts among the pipeline options, and with the number of layers if it is known."""
    yield from schedule_rule(given, parallel)
    yield from virtual_stages_rule(given, layers)
    yield from split_rule(given)
    yield from stages_filled_rule(parallel, layers)


def schedule_rule(given: GivenParallel, parallel: ParallelConfig) -> Iterator[str]:
    """The order of work is known, and only what takes a group size or a memory limit is given one."""
    order = parallel.pipeline_schedule
    if order is not None and ":" not in order and order not in PIPELINE_SCHEDULES:
        own = f"{order}:NAME" if order.endswith(".py") else "module:function"
        yield (
            f"--pipeline-schedule {order} is not known; use one of: {', '.join(PIPELINE_SCHEDULES)}, or {own} for an "
            "order of your own."
        )
    group = parallel.microbatch_group_size_per_virtual_pipeline_stage
    named = given.pipeline_schedule
    if group is not None and named not in ("interleaved", None):
        yield (
            f"--microbatch-group-size-per-virtual-pipeline-stage {group} is for --pipeline-schedule interleaved, but "
            f"the schedule is {named}; drop one of the two."
        )
    if given.pipeline_memory_limit_gb is not None and order != "auto":
        yield (
            f"--pipeline-memory-limit-gb {given.pipeline_memory_limit_gb:g} is for --pipeline-schedule auto, "
            f"which chooses by it, but the schedule is {order}; drop one of the two."
        )


def virtual_stages_rule(parallel: GivenParallel, layers: int | None) -> Iterator[str]:
    """The number of stages per rank is given once, and its layers divide."""
    ranks, each = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    asked = {
        "--num-layers-per-virtual-pipeline-stage": each,
        "--num-virtual-stages-per-pipeline-rank": parallel.num_virtual_stages_per_pipeline_rank,
        "--pipeline-model-parallel-layout": parallel.pipeline_model_parallel_layout,
    }
    named = [f"{option} {value}" for option, value in asked.items() if value is not None]
    if len(named) > 1:
        yield f"{' and '.join(named)} each say how many stages a rank has; give only one of them."
    if each is not None and layers and layers % (ranks * each):
        yield (
            f"--num-layers-per-virtual-pipeline-stage {each} does not divide the {layers} layers over {ranks} pipeline "
            f"ranks; {layers} must be a multiple of {ranks} x {each} = {ranks * each}."
        )


def split_rule(parallel: GivenParallel) -> Iterator[str]:
    """Layers go to stages by one rule: written out, by cost, or evenly with what the ends are given."""
    ways = {
        "--pipeline-model-parallel-layout": parallel.pipeline_model_parallel_layout,
        "--pipeline-split-costs": parallel.pipeline_split_costs,
    }
    ends = {
        "--decoder-first-pipeline-num-layers": parallel.decoder_first_pipeline_num_layers,
        "--decoder-last-pipeline-num-layers": parallel.decoder_last_pipeline_num_layers,
        "--account-for-embedding-in-pipeline-split": parallel.account_for_embedding_in_pipeline_split or None,
        "--account-for-loss-in-pipeline-split": parallel.account_for_loss_in_pipeline_split or None,
    }
    chosen = [option for option, value in ways.items() if value is not None]
    if chosen and (others := [*chosen[1:], *(option for option, value in ends.items() if value is not None)]):
        yield f"{chosen[0]} and {' and '.join(others)} both say how layers are split; give only one of them."
    yield from _end_stage_problems(parallel)


def stages_filled_rule(parallel: ParallelConfig, layers: int | None) -> Iterator[str]:
    """Every stage of an even split gets a layer."""
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_stages or 1)
    if not layers or parallel.pipeline_model_parallel_layout or parallel.pipeline_split_costs:
        return
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if stages == 1:
        for option, fixed in (("first", first), ("last", last)):
            if fixed not in (None, layers):
                yield (
                    f"--decoder-{option}-pipeline-num-layers {fixed} needs more than one pipeline stage, but "
                    f"--pipeline-model-parallel-size is 1 and holds all {layers} layers; drop it."
                )
        return
    fixed_layers = (first or 0) + (last or 0)
    open_stages = stages - (first is not None) - (last is not None)
    counted = parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split
    if open_stages == 0 and fixed_layers != layers:
        yield (
            f"--decoder-first-pipeline-num-layers {first} and --decoder-last-pipeline-num-layers {last} hold "
            f"{fixed_layers} layers on 2 stages, but --num-layers is {layers}; make them add up, or give only one."
        )
    elif layers - fixed_layers + counted < open_stages:
        several = f" with {parallel.virtual_stages} stages per rank" if (parallel.virtual_stages or 1) > 1 else ""
        fixed = f" besides the {fixed_layers} fixed ones" if fixed_layers else ""
        yield (
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}{several} is more than "
            f"--num-layers {layers} can fill: {max(0, layers - fixed_layers)} layers{fixed} are left for {open_stages} "
            f"stages; use at most {layers} stages, more layers, or fewer fixed ones."
        )


def _end_stage_problems(parallel: GivenParallel) -> Iterator[str]:
    """An end of the pipeline is fixed or worked out, not both."""
    ends = (
        (
            "first",
            parallel.decoder_first_pipeline_num_layers,
            "embedding",
            parallel.account_for_embedding_in_pipeline_split,
        ),
        ("last", parallel.decoder_last_pipeline_num_layers, "loss", parallel.account_for_loss_in_pipeline_split),
    )
    for end, fixed, part, counted in ends:
        if fixed is not None and counted:
            yield (
                f"--decoder-{end}-pipeline-num-layers {fixed} already fixes what --account-for-{part}-in-pipeline-"
                "split would work out; give only one of the two."
            )
