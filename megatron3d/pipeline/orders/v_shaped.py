"""Orders on a V: rank r holds stage r on the way down and the r-th stage from the end on the way up.

Both ends of the model lie on rank 0, so a microbatch that is finished frees memory where the next one starts, and all
ranks can hold the same amount. The rows are written as phases of words such as "F0 I1 W1": the op, and the way, 0 down
or 1 up. Microbatches follow each other on each way. Start and end of the phases work on `num_ranks` microbatches or
twice as many; where there are fewer, the surplus is left out of all rows, and nobody waits for what is in no row.
"""

from __future__ import annotations

from collections import Counter, deque

from megatron3d.pipeline.orders.placement import require_sizes, v_shape
from megatron3d.pipeline.schedule import Op, Schedule, Step


def zb_v(num_ranks: int, num_microbatches: int, virtual: int = 2) -> Schedule:
    """No bubble from a rank's first to its last step if F = I = W, in the memory of 1F1B's first rank.

    At most 2 num_ranks (stage, microbatch) are alive on every rank, each half as large as with one stage per rank.
    The rule of the steady part is one forward, one input and one weight gradient down, and the same up. Without a
    bubble from 2 num_ranks - 1 microbatches on. What was said of waiting at the end of a step in `zero_bubble`
    holds here, with forwards half as long.

    Raises:
        ScheduleError: if a size is under 1, or `virtual` is not 2.

    Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism (arXiv:2401.10241), section 6; Qi et al. 2024, Pipeline
    Parallelism with Controllable Memory (arXiv:2405.15362), where it is the V-ZB building block.
    """
    require_sizes("zb-v", num_ranks, num_microbatches, virtual, fixed=2)
    steady = max(num_microbatches - num_ranks, 0)
    phases = []
    for rank in range(num_ranks):
        below = num_ranks - rank
        phases.append(
            ["F0"] * (2 * below - 1)
            + ["F1 F0"] * rank
            + ["F1 I1 W1"] * below
            + ["F0 I0 W0 F1 I1 W1"] * steady
            + ["I0 I1"] * rank
            + ["I0 W0"] * below
            + ["W1"] * rank
            + ["W0"] * rank
        )
    return _on_a_v("zb-v", num_microbatches, phases)


def dualpipe_v(num_ranks: int, num_microbatches: int, virtual: int = 2) -> Schedule:
    """Forwards of one way beside full backwards of the other; backwards are split only where they fill a bubble.

    DualPipe overlaps the communication of such a pair with its computation; here the two stand one after the other,
    which is the same order of work. At most 2 num_ranks + 1 (stage, microbatch) are alive on every rank. The bubble is
    at most (num_ranks - 1) (F&B + B - 3 W), where B = I + W and a pair takes F&B = F + B, given 2 num_ranks
    microbatches and W no longer than F or I; DualPipe refuses fewer, here they have a longer bubble.

    Raises:
        ScheduleError: if a size is under 1, or `virtual` is not 2.

    Source: DeepSeek-AI 2024, DeepSeek-V3 Technical Report (arXiv:2412.19437), section 3.2.1, for DualPipe; the V is
    its half, from Sea AI Lab's note "Cut-in-half" and the eight phases of DeepSeek's DualPipeV, whose table gives the
    bubble and the memory for PP = 2 num_ranks stages.
    """
    require_sizes("dualpipe-v", num_ranks, num_microbatches, virtual, fixed=2)
    steady = max(num_microbatches - 2 * num_ranks, 0)
    phases = []
    for rank in range(num_ranks):
        below, half = num_ranks - 1 - rank, (rank + 1) // 2
        # From the middle of the last backwards on, weight gradients wait; on odd ranks one step earlier.
        turn = ["B1 B0"] * half + ["I1 I0" if rank % 2 else "B1 I0"] + ["I1 I0"] * (rank - half)
        phases.append(
            ["F0"] * (2 * below)
            + ["F0 F1"] * (rank + 1)
            + ["I1 W F1"] * below
            + ["F0 B1 F1 B0"] * (steady + rank + 1)
            + ["B1 F1 B0"] * below
            + turn
            + ["W I0"] * below
            + ["W"] * (rank + 1)
        )
    return _on_a_v("dualpipe-v", num_microbatches, phases)


def _on_a_v(name: str, num_microbatches: int, phases: list[list[str]]) -> Schedule:
    """The schedule whose rank r carries out the words of `phases[r]`."""
    rows = tuple(_row(rank, len(phases), words, num_microbatches) for rank, words in enumerate(phases))
    return Schedule(name, 2 * len(phases), num_microbatches, rows, v_shape(len(phases)))


def _row(rank: int, num_ranks: int, phases: list[str], num_microbatches: int) -> tuple[Step, ...]:
    """The steps of one rank: each word takes the next microbatch of its way; a bare W the oldest waiting W of both."""
    stages = (rank, 2 * num_ranks - 1 - rank)
    forwards, backwards = Counter[int](), Counter[int]()
    waiting: deque[tuple[int, int]] = deque()  # (way, microbatch) whose weight gradient is still to be done
    row = []
    for word in " ".join(phases).split():
        op, way = Op(word[0]), int(word[1:] or 0)
        if op is Op.W:
            way, mb = next(item for item in waiting if len(word) == 1 or item[0] == way)
            waiting.remove((way, mb))
        else:
            count = forwards if op is Op.F else backwards
            mb = count[way]
            count[way] += 1
        if op is Op.I:
            waiting.append((way, mb))
        row.append(Step(op, stages[way], mb))
    return tuple(step for step in row if step.mb < num_microbatches)
