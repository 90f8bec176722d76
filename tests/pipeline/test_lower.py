"""Lowered rows carried out by machines that are as strict as a transport can be, for named and for random schedules."""

from __future__ import annotations

from collections import Counter, deque
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.lower import lower
from megatron3d.pipeline.orders import ORDERS, build_schedule, forward_only, gpipe, one_f_one_b
from megatron3d.pipeline.schedule import Action, Op, Recv, Reduce, Schedule, Send, Step

Rows = tuple[tuple[Action, ...], ...]


@st.composite
def named_schedules(draw: st.DrawFn) -> Schedule:
    """Any named order at any size."""
    name, num_ranks = draw(st.sampled_from(sorted(ORDERS))), draw(st.integers(1, 16))
    return build_schedule(name, num_ranks=num_ranks, num_microbatches=draw(st.integers(1, 64)))


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


def stuck_actions(rows: Rows, schedule: Schedule) -> list[str]:
    """Run the rows on a strict transport and return what could not finish.

    Posting a receive never waits. A send waits until its data has been taken (rendezvous). All messages of a rank,
    whatever the peer and direction, go through one queue, strictly one after the other: a message passes only when
    it is at the head of both its queues. A step waits for its message, and its local input must already be there.
    """
    position = [0] * len(rows)
    queues: list[deque[Message]] = [deque() for _ in rows]
    passed: set[Message] = set()
    computed: set[Step] = set()

    def advance(rank: int) -> bool:
        action = rows[rank][position[rank]]
        if isinstance(action, Step):
            needed = input_of(action, rank, schedule)
            if needed is not None and (*needed, rank) not in passed:
                return False
            computed.add(action)
        elif isinstance(action, (Send, Recv)):
            message = message_of(action, rank)
            if message not in queues[rank] and message not in passed:
                queues[rank].append(message)
            _pass_heads(queues, passed)
            if isinstance(action, Send) and message not in passed:
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


def _pass_heads(queues: list[deque[Message]], passed: set[Message]) -> None:
    """Let messages through that head both queues, until none does."""
    heads = {queue[0] for queue in queues if queue}
    while ready := [m for m in heads if queues[m[3]] and queues[m[4]] and queues[m[3]][0] == m == queues[m[4]][0]]:
        for message in ready:
            passed.add(message)
            queues[message[3]].popleft()
            queues[message[4]].popleft()
        heads = {queue[0] for queue in queues if queue}


@settings(max_examples=25, deadline=None)
@given(named_schedules())
def test_named_orders_cannot_deadlock_on_one_strict_rendezvous_queue_per_rank(schedule):
    assert stuck_actions(lower(schedule), schedule) == []


@settings(max_examples=150, deadline=None)
@given(random_schedules())
def test_random_schedules_cannot_deadlock_on_one_strict_rendezvous_queue_per_rank(schedule):
    assert stuck_actions(lower(schedule), schedule) == []


def test_the_strict_transport_notices_two_messages_in_crossed_order():
    schedule = one_f_one_b(2, 2)
    first, second = (list(row) for row in lower(schedule))
    receives = [i for i, action in enumerate(second) if isinstance(action, Recv)]
    second[receives[0]], second[receives[1]] = second[receives[1]], second[receives[0]]
    assert stuck_actions((tuple(first), tuple(second)), schedule) != []


@settings(max_examples=100, deadline=None)
@given(random_schedules())
def test_both_ends_of_every_pair_of_ranks_see_one_order_of_messages(schedule):
    rows = lower(schedule)
    messages = [[message_of(a, rank) for a in row if isinstance(a, (Send, Recv))] for rank, row in enumerate(rows)]
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
            if isinstance(action, Recv):
                posted.add((action.what, action.stage, action.mb, action.peer))
            if isinstance(action, Step) and (needed := input_of(action, rank, schedule)) is not None:
                posted.remove(needed)  # a KeyError here is a step whose receive was not posted
            if isinstance(action, Send):
                ops = (Op.F,) if action.what == "activation" else (Op.B, Op.I)
                assert before in [Step(op, action.stage, action.mb) for op in ops]
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
        assert all(isinstance(a, Send) for a in row[last + 1 : at])


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
            if isinstance(action, Recv) and action.what == "activation" and action.mb > 0:
                assert at < steps[Step(Op.F, action.stage, action.mb - 1)]


@pytest.mark.parametrize("num_microbatches", [4, 64])
def test_receive_buffers_do_not_grow_with_the_number_of_microbatches(num_microbatches):
    for build in (forward_only, gpipe, one_f_one_b):
        schedule = build(4, num_microbatches)
        for rank, row in enumerate(lower(schedule)):
            waiting = peak = 0
            for action in row:
                waiting += isinstance(action, Recv)
                peak = max(peak, waiting)
                waiting -= isinstance(action, Step) and input_of(action, rank, schedule) is not None
            assert peak <= 2


def test_a_circle_of_waiting_is_refused():
    rows = (
        tuple(Step(Op(o), 0, int(mb)) for o, mb in ("F0", "B0", "F1", "B1")),
        tuple(Step(Op(o), 1, int(mb)) for o, mb in ("F0", "F1", "B0", "B1")),
    )
    with pytest.raises(ScheduleError, match=r"rank 0 waits before B\(stage 0, mb 0\)"):
        lower(Schedule("crossed", 2, 2, rows, (0, 1)))
