"""Where an order puts the stages of the model, and which sizes it takes.

A placement is `stage_to_rank`: the pipeline rank of each stage, in the order of the stages. It does not depend on the
number of microbatches, so that a model can be built before anybody knows how long a step is.
"""

from __future__ import annotations

from megatron3d.errors import ScheduleError


def round_robin(num_ranks: int, virtual: int) -> tuple[int, ...]:
    """Stage s lives on rank s modulo `num_ranks`: the model runs `virtual` times through all ranks.

    Source: Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM
    (arXiv:2104.04473), section 2.2.2.
    """
    return tuple(stage % num_ranks for stage in range(num_ranks * virtual))


def v_shape(num_ranks: int, virtual: int = 2) -> tuple[int, ...]:
    """Two stages per rank, down the ranks and up again: rank r holds stage r and the r-th stage from the end.

    The first and the last stage share rank 0, and a microbatch that turns round on the last rank needs no message.

    Raises:
        ScheduleError: if `virtual` is not 2.

    Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism (arXiv:2401.10241), section 6.
    """
    if virtual != 2:
        raise ScheduleError(f"a V-shaped placement has 2 stages per rank, but {virtual} were asked for; use 2")
    return (*range(num_ranks), *reversed(range(num_ranks)))


def require_sizes(name: str, num_ranks: int, num_microbatches: int, virtual: int, *, fixed: int | None = None) -> None:
    """Refuse sizes that leave nothing to do, and another number of stages per rank than `fixed`.

    Raises:
        ScheduleError: naming the order, the size and what to use instead.
    """
    if min(num_ranks, num_microbatches, virtual) < 1:
        raise ScheduleError(
            f"--pipeline-schedule {name} with {num_ranks} pipeline ranks, {virtual} stages per rank and "
            f"{num_microbatches} microbatches has nothing to run; each must be at least 1"
        )
    if fixed is not None and virtual != fixed:
        stages = "one stage" if fixed == 1 else f"{fixed} stages"
        raise ScheduleError(
            f"--pipeline-schedule {name} has {stages} per rank, but {virtual} virtual stages per rank were asked for; "
            f"use {fixed}, or an order that takes {virtual}, such as interleaved or breadth-first"
        )
