"""Lowered rows carried out by machines that are as strict as a transport can be, for named and for random schedules."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import combinations
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.lower import lower
from megatron3d.pipeline.orders.named import ORDERS, build_schedule, forward_only, gpipe, one_f_one_b, virtual_of
from megatron3d.pipeline.schedule import Action, Exchange, Op, Recv, Reduce, Schedule, Send, Step, handover
from megatron3d.pipeline.simulate import simulate

Rows = tuple[tuple[Action, ...], ...]


@st.composite
def named_schedules(draw: st.DrawFn) -> Schedule:
    """Any named order at any size."""
    name, num_ranks = draw(st.sampled_from(sorted(ORDERS))), draw(st.integers(1, 16))
    virtual = virtual_of(name) or draw(st.integers(1, 4))
    return build_schedule(name, num_ranks=num_ranks, num_microbatches=draw(st.integers(1, 64)), virtual=virtual)


@st.composite
def random_schedules(draw: st.DrawFn) -> Schedule:
    """Stages anywhere on the ranks, B or I and W per stage and microbatch, steps in any order that can be run."""
    num_ranks, num_stages, num_mb = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 6))
    random = draw(st.randoms(use_true_random=False))
    places = tuple(random.randrange(num_ranks) for _ in range(num_stages))
    ready = [Step(Op.F, 0, mb) for mb in range(num_mb)]
    rows: list[list[Step]] = [[] for _ in range(num_ranks)]
    while ready:
        op, stage, mb = step = ready.pop(random.randrange(len(ready)))
        rows[places[stage]].append(step)
        if op is Op.F and stage < num_stages - 1:
            ready.append(Step(Op.F, stage + 1, mb))
        elif op is Op.F or (op in (Op.B, Op.I) and stage > 0):
            ready.append(Step(random.choice((Op.B, Op.I)), stage if op is Op.F else stage - 1, mb))
        if op is Op.I:
            ready.append(Step(Op.W, stage, mb))
    return Schedule("random", num_stages, num_mb, tuple(map(tuple, rows)), places)


def messages_of(actions: Iterable[Action]) -> list[Send | Recv]:
    """All messages in the order in which they are posted."""
    return [message for action in actions if isinstance(action, Exchange) for message in action.messages]


Message = tuple[str, int, int, int, int]  # what, consumer stage, mb, sender, receiver


def message_of(action: Send | Recv, rank: int) -> Message:
    """The same key for both ends of a message."""
    if isinstance(action, Recv):
        return (action.what, action.stage, action.mb, action.peer, rank)
    consumer = action.stage + (1 if action.what == "activation" else -1)
    return (action.what, consumer, action.mb, rank, action.peer)


def input_of(step: Step, rank: int, schedule: Schedule) -> tuple[str, int, int, int] | None:
    """What, stage, mb and sender of the message `step` cannot start without; None for local input."""
    other = step.stage - 1 if step.op is Op.F else step.stage + 1
    if step.op is Op.W or not 0 <= other < schedule.num_stages or schedule.stage_to_rank[other] == rank:
        return None
    what = "activation" if step.op is Op.F else "gradient"
    return (what, step.stage, step.mb, schedule.stage_to_rank[other])


Waits = Literal["never", "behind a send", "always"]
WAITS: tuple[Waits, ...] = ("never", "behind a send", "always")


def stuck_actions(rows: Rows, schedule: Schedule, waits: Waits) -> list[str]:
    """Run the rows on a strict transport and return what could not finish.

    All exchanges of a rank, whatever the peers and directions, go through one queue, strictly one after the other. A
    message passes when the exchanges that hold it head both its ranks' queues (rendezvous), and an exchange leaves its
    queue when all its messages have passed. A step waits for the whole exchange that brings its message, and its local
    input must already be there. Posting an exchange waits until it is over never, always, or if it sends something.
    """
    position = [0] * len(rows)
    queues: list[deque[frozenset[Message]]] = [deque() for _ in rows]
    passed: set[Message] = set()
    exchange_of: dict[tuple[Message, int], frozenset[Message]] = {}

    def advance(rank: int) -> bool:
        action = rows[rank][position[rank]]
        if isinstance(action, Step):
            needed = input_of(action, rank, schedule)
            if needed is not None and not exchange_of.get(((*needed, rank), rank), {None}) <= passed:
                return False
        elif isinstance(action, Exchange):
            messages = frozenset(message_of(message, rank) for message in action.messages)
            if (next(iter(messages)), rank) not in exchange_of:
                exchange_of.update({(message, rank): messages for message in messages})
                queues[rank].append(messages)
            _pass_heads(queues, passed)
            sends = any(isinstance(message, Send) for message in action.messages)
            if (waits == "always" or (waits == "behind a send" and sends)) and not messages <= passed:
                return False
        position[rank] += 1
        return True

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while position[rank] < len(row) and advance(rank):
                moved = True
    return [f"rank {rank}: {row[position[rank]]}" for rank, row in enumerate(rows) if position[rank] < len(row)]


def _pass_heads(queues: list[deque[frozenset[Message]]], passed: set[Message]) -> None:
    """Let messages through whose exchanges head both queues, until none does."""
    moved = True
    while moved:
        heads = [queue[0] if queue else frozenset() for queue in queues]
        new = {message for head in heads for message in head if message in heads[message[3]] & heads[message[4]]}
        moved = not new <= passed
        passed |= new
        for queue in queues:
            if queue and queue[0] <= passed:
                queue.popleft()
                moved = True


@settings(max_examples=25, deadline=None)
@given(named_schedules())
def test_named_orders_cannot_deadlock_on_one_strict_rendezvous_queue_per_rank(schedule):
    rows = lower(schedule)
    assert [stuck_actions(rows, schedule, waits) for waits in WAITS] == [[], [], []]


@settings(max_examples=150, deadline=None)
@given(random_schedules())
def test_random_schedules_cannot_deadlock_on_one_strict_rendezvous_queue_per_rank(schedule):
    rows = lower(schedule)
    assert [stuck_actions(rows, schedule, waits) for waits in WAITS] == [[], [], []]


@pytest.mark.parametrize("waits", WAITS)
def test_the_strict_transport_notices_two_exchanges_in_crossed_order(waits):
    schedule = one_f_one_b(2, 2)
    first, second = (list(row) for row in lower(schedule))
    exchanges = [i for i, action in enumerate(second) if isinstance(action, Exchange)]
    second[exchanges[0]], second[exchanges[1]] = second[exchanges[1]], second[exchanges[0]]
    assert stuck_actions((tuple(first), tuple(second)), schedule, waits) != []


def due_times(schedule: Schedule) -> dict[Message, float]:
    """When the step ends that produces each message."""
    return {
        (what, user, step.mb, rank, schedule.stage_to_rank[user]): end
        for rank, step, _, end in simulate(schedule).steps
        if (hand := handover(step, schedule)) is not None
        for what, user in [("activation" if step.op is Op.F else "gradient", hand[0])]
    }


@settings(max_examples=100, deadline=None)
@given(random_schedules())
def test_an_exchange_holds_what_is_due_together_and_two_ranks_that_send_to_each_other_do_so_at_once(schedule):
    due = due_times(schedule)
    exchanges = [
        (rank, [message_of(message, rank) for message in action.messages])
        for rank, row in enumerate(lower(schedule))
        for action in row
        if isinstance(action, Exchange)
    ]
    for rank, messages in exchanges:
        assert len({due[message] for message in messages}) == 1
        assert sum(message[3] == rank for message in messages) <= 1
        for what, user, mb, sender, receiver in messages:
            back = [m for m in due if m[3:] == (receiver, sender) and due[m] == due[what, user, mb, sender, receiver]]
            assert set(back) <= set(messages)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_steady_state_of_1f1b_sends_and_receives_over_a_link_at_once(num_ranks):
    for row in lower(one_f_one_b(num_ranks, 8)):
        assert sum(isinstance(action, Exchange) and len(action.messages) == 2 for action in row) >= 8 - num_ranks


@settings(max_examples=100, deadline=None)
@given(random_schedules())
def test_both_ends_of_every_pair_of_ranks_see_one_order_of_messages(schedule):
    rows = lower(schedule)
    messages = [[message_of(message, rank) for message in messages_of(row)] for rank, row in enumerate(rows)]
    for one, other in combinations(range(len(rows)), 2):
        pair = {one, other}
        assert [m for m in messages[one] if {m[3], m[4]} == pair] == [
            m for m in messages[other] if {m[3], m[4]} == pair
        ]
    assert all(count == 2 for count in Counter(m for row in messages for m in row).values())
    assert all(m[3] != m[4] for row in messages for m in row)


@settings(max_examples=100, deadline=None)
@given(random_schedules())
def test_steps_keep_their_order_with_each_message_where_it_belongs(schedule):
    for rank, row in enumerate(lower(schedule)):
        assert tuple(a for a in row if isinstance(a, Step)) == schedule.rows[rank]
        posted: set[tuple[str, int, int, int]] = set()
        for before, action in zip((None, *row), row):
            if isinstance(action, Step) and (needed := input_of(action, rank, schedule)) is not None:
                posted.remove(needed)  # a KeyError here is a step whose receive was not posted
            for message in messages_of([action]):
                if isinstance(message, Recv):
                    posted.add((message.what, message.stage, message.mb, message.peer))
                else:
                    ops = (Op.F,) if message.what == "activation" else (Op.B, Op.I)
                    assert before in [Step(op, message.stage, message.mb) for op in ops]
        assert posted == set()


@settings(max_examples=100, deadline=None)
@given(random_schedules())
def test_each_stage_is_reduced_once_after_its_last_weight_gradient(schedule):
    rows = lower(schedule)
    assert sorted(a.stage for row in rows for a in row if isinstance(a, Reduce)) == list(range(schedule.num_stages))
    for stage, rank in enumerate(schedule.stage_to_rank):
        row = rows[rank]
        at = row.index(Reduce(stage))
        last = max(i for i, a in enumerate(row) if isinstance(a, Step) and a.stage == stage and a.op in (Op.B, Op.W))
        assert at > last
        assert all(isinstance(a, Exchange) for a in row[last + 1 : at])
        assert at - last <= 2


def test_without_backward_there_is_nothing_to_reduce():
    assert not any(isinstance(a, Reduce) for row in lower(forward_only(4, 8)) for a in row)


def test_one_rank_with_all_stages_sends_nothing():
    rows = lower(forward_only(1, 4, 3))
    assert all(isinstance(a, Step) for a in rows[0])


@pytest.mark.parametrize("schedule", [forward_only(4, 12), gpipe(4, 12)])
def test_the_next_microbatch_is_received_while_this_one_is_computed(schedule):
    for row in lower(schedule)[1:]:
        steps = {a: i for i, a in enumerate(row) if isinstance(a, Step)}
        for at, action in enumerate(row):
            for message in messages_of([action]):
                if isinstance(message, Recv) and message.what == "activation" and message.mb > 0:
                    assert at < steps[Step(Op.F, message.stage, message.mb - 1)]


@pytest.mark.parametrize("num_microbatches", [4, 64])
@pytest.mark.parametrize("name", sorted(set(ORDERS) - {"breadth-first"}))
def test_receive_buffers_do_not_grow_with_the_number_of_microbatches(name, num_microbatches):
    bound = 2 if name in ("gpipe", "1f1b", "zb-h1", "forward-only") else 4
    schedule = build_schedule(name, num_ranks=4, num_microbatches=num_microbatches, virtual=virtual_of(name) or 2)
    for rank, row in enumerate(lower(schedule)):
        waiting = peak = 0
        for action in row:
            waiting += sum(isinstance(message, Recv) for message in messages_of([action]))
            peak = max(peak, waiting)
            waiting -= isinstance(action, Step) and input_of(action, rank, schedule) is not None
        assert peak <= bound


def test_a_circle_of_waiting_is_refused():
    rows = (
        tuple(Step(Op(o), 0, int(mb)) for o, mb in ("F0", "B0", "F1", "B1")),
        tuple(Step(Op(o), 1, int(mb)) for o, mb in ("F0", "F1", "B0", "B1")),
    )
    with pytest.raises(ScheduleError, match=r"rank 0 waits before B\(stage 0, mb 0\)"):
        lower(Schedule("crossed", 2, 2, rows, (0, 1)))
