"""From steps to actions: which messages each rank posts where, and where it starts a reduction.

All messages have one global order, that in which the steps that produce them end on the nominal timeline (`simulate`
with its default costs); steps that end together stand in the timeline's order. A message is due when its step ends.
Each rank posts its messages in exchanges:

- a send stands right behind the step that produces its data;
- a receive stands as early as the global order allows, and no earlier than its data is being produced, so that a rank
  is not asked to hold buffers for messages of the far future;
- where two ranks send to each other at the same time, each posts both messages together, behind its own step: over a
  link with two directions this takes the time of one message, and neither rank could go on without the other's anyway;
- messages that are due together and stand side by side are one exchange, so that different links are used at once.

Both ends of every pair of ranks see the same order of messages, both directions taken together, as NCCL needs for
messages that share a communicator. And nothing can deadlock, even where each rank has one queue for all its exchanges
and carries them out strictly one after the other, an exchange being over only when all its messages have passed, and
even where posting waits for that. Take the earliest time T at which something is stuck.

1. A step that ends at T needs only messages due before T, since a step takes time. So every step that ends at T is
   stuck, if at all, behind an exchange of its own rank that is due at T and stands before it.
2. Such an exchange only receives, and only from steps that come before its rank's own step in the global order: where
   the two ranks send to each other it stands behind. Take the stuck one whose rank's step comes first. Its senders'
   steps come earlier still, so their ranks are not stuck before them: they have carried them out and posted the sends.
   So it is not stuck.
3. Hence all steps that end at T are done, all exchanges due at T are posted, and all that stand before a step are
   over. Each rank has at most one more, at the head of its queue, whose messages have both ends there: they pass.

Messages that are due at different times are never put together, although that would not deadlock either: a step would
wait for what it does not need, and what is produced later.

Stages on one rank hand over locally, without messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter

from megatron3d.pipeline.schedule import Action, Exchange, Op, Recv, Reduce, Schedule, Send, Step, handover
from megatron3d.pipeline.simulate import TimedStep, simulate


def lower(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """One row of actions per pipeline rank: the steps in their order, with exchanges of messages and reductions.

    `Reduce(stage)` stands behind the last step that adds to the stage's weight gradients (and behind the exchange with
    that step's send, which somebody waits for).

    Raises:
        ScheduleError: if the schedule is incomplete or out of order, or its ranks would wait in a circle.
    """
    last_weight_steps = {step.stage: step for step in schedule.steps() if step.op in (Op.B, Op.W)}
    rows: list[list[Action]] = [[] for _ in schedule.rows]
    for _, due in groupby(simulate(schedule).steps, key=attrgetter("end")):
        for rank, actions in enumerate(_due_together(list(due), schedule)):
            rows[rank] += _with_exchanges(actions)
            done = [action for action in actions if isinstance(action, Step)]
            rows[rank] += [Reduce(step.stage) for step in done if last_weight_steps.get(step.stage) == step]
    return tuple(tuple(row) for row in rows)


def _due_together(due: list[TimedStep], schedule: Schedule) -> list[list[Step | Send | Recv]]:
    """By rank: its own step among these, which end at the same time, and what it sends and receives of their data."""
    sends_to = {(rank, send.peer) for rank, step, _, _ in due if (send := _ends(step, schedule)[0]) is not None}
    rows: list[list[Step | Send | Recv]] = [[] for _ in schedule.rows]
    behind: list[list[Recv]] = [[] for _ in schedule.rows]
    for rank, step, _, _ in due:
        rows[rank].append(step)
        send, recv = _ends(step, schedule)
        if send is None or recv is None:
            continue
        rows[rank] += [*behind[rank], send]
        step_is_to_come = (send.peer, rank) in sends_to and not any(isinstance(a, Step) for a in rows[send.peer])
        (behind if step_is_to_come else rows)[send.peer].append(recv)
    return rows


def _with_exchanges(actions: list[Step | Send | Recv]) -> Iterator[Action]:
    """The same actions, messages that stand side by side put together."""
    for are_steps, group in groupby(actions, key=lambda action: isinstance(action, Step)):
        if are_steps:
            yield from (action for action in group if isinstance(action, Step))
        else:
            yield Exchange(tuple(action for action in group if not isinstance(action, Step)))


def _ends(step: Step, schedule: Schedule) -> tuple[Send, Recv] | tuple[None, None]:
    """Both ends of the message that carries what `step` produced; none if it stays on the rank."""
    here = schedule.stage_to_rank[step.stage]
    user_stage, there = handover(step, schedule) or (None, here)
    if user_stage is None or here == there:
        return None, None
    what = "activation" if step.op is Op.F else "gradient"
    return Send(what, step.stage, step.mb, there), Recv(what, user_stage, step.mb, here)
