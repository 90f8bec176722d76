"""From steps to actions: where each rank sends, posts a receive, and starts a reduction.

There is one global order of all messages, and every rank posts its sends and receives in this order. It is the order
in which the producing steps end on the nominal timeline (`simulate` with its default costs). From this follow:

- the two ends of every pair of ranks see the same order of messages, both directions taken together, as NCCL needs
  for messages that share a communicator; even one queue per rank for all its messages, carried out strictly one
  after the other, cannot deadlock;
- a send stands right behind the step that produces its data; a receive stands as early as the order allows, but no
  earlier than its data is being produced, so that a rank is not asked to hold buffers for messages of the far future.

Why nothing can deadlock as long as *posting a receive* does not wait: take the first action in the global order that
has not happened. A step there has all its data, since messages behind earlier steps have been delivered. A message
there has its send posted, and its receive too, because only actions of earlier steps stand before the receive in its
row. So it happens, even where a send waits until its receive is posted and both queues have come to it. A receive
that itself waited for its data where it stands would break this, since it stands ahead of compute: `run` waits only
when a step needs the data.

Stages on one rank hand over locally, without messages.
"""

from __future__ import annotations

from megatron3d.pipeline.schedule import Action, Op, Recv, Reduce, Schedule, Send, Step, handover
from megatron3d.pipeline.simulate import simulate


def lower(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """One row of actions per pipeline rank: the steps in their order, with sends, receives and reductions.

    `Reduce(stage)` stands behind the last step that adds to the stage's weight gradients (and behind that step's
    send, which somebody waits for).

    Raises:
        ScheduleError: if the schedule is incomplete or out of order, or its ranks would wait in a circle.
    """
    last_weight_step = {step.stage: step for step in schedule.steps() if step.op in (Op.B, Op.W)}
    rows: list[list[Action]] = [[] for _ in schedule.rows]
    for rank, step, _, _ in simulate(schedule).steps:
        rows[rank].append(step)
        message = _message(step, schedule)
        if message is not None:
            send, recv = message
            rows[rank].append(send)
            rows[send.peer].append(recv)
        if last_weight_step.get(step.stage) == step:
            rows[rank].append(Reduce(step.stage))
    return tuple(tuple(row) for row in rows)


def _message(step: Step, schedule: Schedule) -> tuple[Send, Recv] | None:
    """Both ends of the message that carries what `step` produced, or None if it stays on the rank."""
    here = schedule.stage_to_rank[step.stage]
    user_stage, there = handover(step, schedule) or (None, here)
    if user_stage is None or here == there:
        return None
    what = "activation" if step.op is Op.F else "gradient"
    return Send(what, step.stage, step.mb, there), Recv(what, user_stage, step.mb, here)
