"""Orders that split the backward, with one stage per rank: weight gradients fill what would be bubbles.

Nobody waits for a weight gradient W, so a rank does its own later, when it would otherwise have nothing to do. The
price is memory: what W reads stays alive until then.

The papers measure each rank from its own first step to its own last one, and let every rank begin the next step of
training when it is done. Where ranks wait for each other at the end of a step, as they do to clip gradients by a global
norm, the last rank's late start counts too, and a rank of the pipeline idles (num_ranks - 1) forwards at least.
`Timeline` has both: `idle_inside` and `idle`.
"""

from __future__ import annotations

from megatron3d.pipeline.orders.placement import require_sizes, round_robin
from megatron3d.pipeline.schedule import Op, Schedule, Step


def zb_h1(num_ranks: int, num_microbatches: int, virtual: int = 1) -> Schedule:
    """1F1B with the memory of its first rank on every rank: those further down spend it on late weight gradients.

    Rank r does each W r microbatches late, so that num_ranks microbatches are alive on every rank. The bubble is
    (num_ranks - 1) (F + I - W) instead of 1F1B's (num_ranks - 1) (F + I + W), for W no longer than F or I.

    Raises:
        ScheduleError: if a size is under 1, or `virtual` is not 1.

    Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism (arXiv:2401.10241), section 2.1 and figure 3 (top).
    """
    require_sizes("zb-h1", num_ranks, num_microbatches, virtual, fixed=1)
    return _late_weights("zb-h1", num_ranks, num_microbatches, lead=1)


def zb_h2(num_ranks: int, num_microbatches: int, virtual: int = 1) -> Schedule:
    """Twice the memory of `zb_h1`, spent on forwards before the first backward comes back: no bubble if F = I = W.

    Rank r starts with 2 (num_ranks - 1 - r) forwards and does each W 2 r microbatches late: 2 num_ranks - 1
    microbatches are alive on every rank. From its first to its last step a rank idles at most
    (num_ranks - 1) (F + I - 2 W), given at least 2 num_ranks - 1 microbatches and W no longer than F or I.

    Raises:
        ScheduleError: if a size is under 1, or `virtual` is not 1.

    Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism (arXiv:2401.10241), section 2.2 and figure 3 (bottom).
    """
    require_sizes("zb-h2", num_ranks, num_microbatches, virtual, fixed=1)
    return _late_weights("zb-h2", num_ranks, num_microbatches, lead=2)


def _late_weights(name: str, num_ranks: int, num_microbatches: int, *, lead: int) -> Schedule:
    """Rank r runs `lead` x (its distance to the end) forwards ahead, and lags `lead` x r weight gradients behind."""
    rows = []
    for rank in range(num_ranks):
        ahead, behind = lead * (num_ranks - 1 - rank), lead * rank
        row = [Step(Op.F, rank, mb) for mb in range(ahead)]
        for mb in range(num_microbatches + behind):
            row += [Step(Op.F, rank, mb + ahead), Step(Op.I, rank, mb), Step(Op.W, rank, mb - behind)]
        rows.append(tuple(step for step in row if 0 <= step.mb < num_microbatches))
    return Schedule(name, num_ranks, num_microbatches, tuple(rows), round_robin(num_ranks, 1))
