"""A pipeline order of your own: --pipeline-schedule examples/my_pipeline_order.py:last_in_first_out

GPipe with the backwards in reverse: the microbatch that came last goes back first. Look at it before you train with it:

    python tools/show_schedule.py --pipeline-schedule examples/my_pipeline_order.py:last_in_first_out \
        --stages 4 --microbatches 8
"""

from megatron3d.pipeline.schedule import Op, Schedule, Step


def last_in_first_out(num_ranks: int, num_microbatches: int, virtual: int) -> Schedule:
    """Stage s is on rank s modulo num_ranks; every rank does all its forwards, then undoes them in reverse."""
    stage_to_rank = tuple(stage % num_ranks for stage in range(num_ranks * virtual))
    rows = []
    for rank in range(num_ranks):
        stages = range(rank, len(stage_to_rank), num_ranks)
        order = [(stage, microbatch) for stage in stages for microbatch in range(num_microbatches)]
        forwards = [Step(Op.F, stage, microbatch) for stage, microbatch in order]
        backwards = [Step(Op.B, stage, microbatch) for stage, microbatch in reversed(order)]
        rows.append((*forwards, *backwards))
    return Schedule("last in, first out", len(stage_to_rank), num_microbatches, tuple(rows), stage_to_rank)
