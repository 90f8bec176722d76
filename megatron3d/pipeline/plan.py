"""PipelinePlan: how one run is cut along its depth: which order of work, which stage on which rank, which layers where.

A plan is made once, before a tensor exists; from it come the training schedule and the forward-only schedule of any
number of micro-batches, both with the same stages on the same ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.orders.named import build_schedule, forward_only_on
from megatron3d.pipeline.schedule import Schedule


@dataclass(frozen=True)
class PipelinePlan:
    """The order of work by name, the placement of the stages and the layers of each.

    Attributes:
        order: name of an order in `ORDERS`, or `module:function` of a user's own.
        num_ranks: pipeline ranks.
        virtual: stages on each rank.
        stage_to_rank: the rank of each stage.
        layers: the layer numbers of each stage.
        group_size: micro-batches that pass through a rank's stages together; None is the order's default.
        why: how the order was chosen, in words; empty where the user named it.
    """

    order: str
    num_ranks: int
    virtual: int
    stage_to_rank: tuple[int, ...]
    layers: tuple[range, ...]
    group_size: int | None = None
    why: str = ""

    @property
    def num_stages(self) -> int:
        """Stages of all ranks."""
        return len(self.stage_to_rank)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of one rank, first to last."""
        return tuple(stage for stage, place in enumerate(self.stage_to_rank) if place == rank)

    def training(self, num_microbatches: int) -> Schedule:
        """The schedule of a training step.

        Raises:
            ScheduleError: the order does not take this many micro-batches, or places its stages elsewhere than the
                plan says, as a user's own order may.
        """
        schedule = build_schedule(
            self.order,
            num_ranks=self.num_ranks,
            num_microbatches=num_microbatches,
            virtual=self.virtual,
            group_size=self.group_size,
        )
        if schedule.stage_to_rank != self.stage_to_rank:
            raise ScheduleError(
                f"--pipeline-schedule {self.order} places its stages on ranks {schedule.stage_to_rank} for "
                f"{num_microbatches} microbatches, but on {self.stage_to_rank} before; weights cannot move between "
                "steps, so place stages the same way for every number of microbatches"
            )
        return schedule

    def forward_only(self, num_microbatches: int) -> Schedule:
        """The schedule of an evaluation or of generation."""
        return forward_only_on(self.stage_to_rank, num_microbatches)
