"""Every named order is complete and ordered at any size; the classics have the bubble and the memory the papers give.

The figures of the other orders are in the test_orders_* files beside this one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.orders.named import (
    ORDERS,
    build_schedule,
    forward_only,
    forward_only_on,
    gpipe,
    one_f_one_b,
    placement_of,
    virtual_of,
)
from megatron3d.pipeline.orders.placement import v_shape
from megatron3d.pipeline.schedule import Op, Schedule, Step, check, handover, needs
from megatron3d.pipeline.simulate import simulate

RANKS = st.integers(1, 16)
MICROBATCHES = st.integers(1, 64)


def row_of(text: str, stage: int) -> tuple[Step, ...]:
    """A row written as "F0 B0 ..." for one stage."""
    return tuple(Step(Op(word[0]), stage, int(word[1:])) for word in text.split())


def by_hand(*rows: str) -> Schedule:
    """A schedule with stage = rank from rows written as text."""
    num_microbatches = 1 + max(int(word[1:]) for row in rows for word in row.split())
    steps = tuple(row_of(row, stage) for stage, row in enumerate(rows))
    return Schedule("by hand", len(rows), num_microbatches, steps, tuple(range(len(rows))))


@st.composite
def sized_orders(draw: st.DrawFn, *, ranks: st.SearchStrategy[int] = RANKS) -> tuple[str, int, int, int]:
    """A named order, ranks, microbatches and stages per rank that it takes."""
    name = draw(st.sampled_from(sorted(ORDERS)))
    return name, draw(ranks), draw(MICROBATCHES), virtual_of(name) or draw(st.integers(1, 4))


@settings(max_examples=80, deadline=None)
@given(sized_orders())
def test_every_order_has_each_step_exactly_once_and_never_deadlocks(sized):
    name, p, m, virtual = sized
    schedule = build_schedule(name, num_ranks=p, num_microbatches=m, virtual=virtual)
    cells = [(stage, mb) for stage in range(p * virtual) for mb in range(m)]
    counts = Counter(schedule.steps())
    assert set(counts.values()) == {1}
    assert {(stage, mb) for op, stage, mb in counts if op is Op.F} == set(cells)
    for stage, mb in cells:
        ops = "".join(op.value for op in Op if Step(op, stage, mb) in counts)
        assert ops in (["F"] if name == "forward-only" else ["FB", "FIW"])
    assert all(schedule.stage_to_rank[step.stage] == rank for rank, row in enumerate(schedule.rows) for step in row)
    timeline = simulate(schedule)
    ends = {timed.step: timed.end for timed in timeline.steps}
    for timed in timeline.steps:
        op, stage, mb = timed.step
        neighbour = stage - 1 if op is Op.F else stage + 1
        before = [Step(Op.F, stage, mb)] if op is not Op.F else []
        before += [Step(o, neighbour, mb) for o in ((Op.F,) if op is Op.F else (Op.B, Op.I)) if op is not Op.W]
        before += [Step(Op.I, stage, mb)] if op is Op.W else []
        assert all(ends.get(step, 0.0) <= timed.start for step in before)


@settings(max_examples=60, deadline=None)
@given(sized_orders(ranks=st.integers(2, 6)), st.randoms(use_true_random=False))
def test_an_order_with_a_step_lost_doubled_or_brought_forward_is_refused(sized, random):
    name, p, m, virtual = sized
    schedule = build_schedule(name, num_ranks=p, num_microbatches=m, virtual=virtual)
    rank = random.randrange(p)
    row = list(schedule.rows[rank])
    step = random.choice(row)
    lost = [other for other in row if other != step]
    if name != "forward-only":  # a step before what its own rank needs: the backward or W at the very start
        last = row[-1]
        assert_refused(schedule, rank, [last, *row[:-1]])
    assert_refused(schedule, rank, lost)
    assert_refused(schedule, rank, [*row, step])


def assert_refused(schedule: Schedule, rank: int, row: list[Step]) -> None:
    """The schedule with another row is no schedule."""
    rows = (*schedule.rows[:rank], tuple(row), *schedule.rows[rank + 1 :])
    with pytest.raises(ScheduleError):
        simulate(replace(schedule, rows=rows))


@settings(max_examples=40, deadline=None)
@given(sized_orders())
def test_the_placement_of_an_order_is_known_without_its_microbatches(sized):
    name, p, m, virtual = sized
    places = placement_of(name, num_ranks=p, virtual=virtual)
    assert build_schedule(name, num_ranks=p, num_microbatches=m, virtual=virtual).stage_to_rank == places
    expected = (*range(p), *range(p - 1, -1, -1)) if name in ("zb-v", "dualpipe-v") else (*range(p),) * virtual
    assert places == expected


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("num_microbatches", [1, 2, 7])
def test_one_rank_alone_never_idles(name, num_microbatches):
    for virtual in [virtual_of(name)] if virtual_of(name) else [1, 2, 3]:
        timeline = simulate(build_schedule(name, num_ranks=1, num_microbatches=num_microbatches, virtual=virtual))
        assert timeline.idle == timeline.idle_inside == (0.0,)
        assert timeline.span == num_microbatches * virtual * (1 if name == "forward-only" else 3)


def test_the_table_names_the_orders_and_their_stages_per_rank():
    assert {name: virtual_of(name) for name in ORDERS} == {
        "gpipe": 1,
        "1f1b": 1,
        "interleaved": None,
        "breadth-first": None,
        "zb-h1": 1,
        "zb-h2": 1,
        "zb-v": 2,
        "dualpipe-v": 2,
        "forward-only": None,
    }


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["gpipe", "1f1b", "forward-only"]), RANKS, MICROBATCHES)
def test_bubble_is_p_minus_1_over_m_plus_p_minus_1(name, p, m):
    timeline = simulate(build_schedule(name, num_ranks=p, num_microbatches=m))
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(RANKS, MICROBATCHES)
def test_live_activations_are_m_for_gpipe_and_the_distance_to_the_end_for_1f1b(p, m):
    assert simulate(gpipe(p, m)).peak_live_activations == (m,) * p
    assert simulate(one_f_one_b(p, m)).peak_live_activations == tuple(min(p - rank, m) for rank in range(p))
    assert simulate(forward_only(p, m)).peak_live_activations == (1,) * p


def test_1f1b_rows_are_those_of_the_paper():
    rows = one_f_one_b(3, 4).rows
    assert rows[0] == row_of("F0 F1 F2 B0 F3 B1 B2 B3", 0)
    assert rows[1] == row_of("F0 F1 B0 F2 B1 F3 B2 B3", 1)
    assert rows[2] == row_of("F0 B0 F1 B1 F2 B2 F3 B3", 2)


def test_1f1b_with_fewer_microbatches_than_stages_has_no_steady_part():
    assert one_f_one_b(4, 2).rows[0] == row_of("F0 F1 B0 B1", 0)
    assert one_f_one_b(4, 2).rows[3] == row_of("F0 B0 F1 B1", 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 4))
def test_forward_only_serves_several_stages_per_rank(p, m, virtual):
    schedule = build_schedule("forward-only", num_ranks=p, num_microbatches=m, virtual=virtual)
    assert schedule.stage_to_rank == tuple(stage % p for stage in range(p * virtual))
    if m % p == 0:
        assert simulate(schedule).span == m * virtual + p - 1


@settings(max_examples=25, deadline=None)
@given(RANKS, MICROBATCHES)
def test_forwards_on_a_v_take_turns_between_both_ways_without_a_gap(p, m):
    timeline = simulate(forward_only_on(v_shape(p), m))
    assert timeline.span == (2 * m + 2 * p - 2 if p > 1 else 2 * m)
    assert timeline.peak_live_activations == (1,) * p


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 12))
def test_forwards_run_wherever_the_stages_lie(places, m):
    places = tuple(sorted(set(places)).index(rank) for rank in places)  # every rank holds a stage
    schedule = forward_only_on(places, m)
    check(schedule)
    timeline = simulate(schedule)
    assert (schedule.stage_to_rank, schedule.num_microbatches) == (places, m)
    starts = {timed.step: timed.start for timed in timeline.steps}
    for mb in range(1, m):
        assert starts[Step(Op.F, len(places) - 1, mb - 1)] < starts[Step(Op.F, len(places) - 1, mb)]
    assert timeline.span < m * len(places) + 1


def test_forwards_without_a_stage_are_refused():
    with pytest.raises(ScheduleError, match="0 pipeline ranks"):
        forward_only_on((), 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "1F1B"}, ["'1F1B'", "gpipe, 1f1b, interleaved", "did you mean '1f1b'"]),
        ({"name": "forward_only"}, ["did you mean 'forward-only'"]),
        ({"name": "zzz"}, ["'zzz'", "gpipe, 1f1b, interleaved"]),
        ({"virtual": 2}, ["1f1b has one stage", "2 virtual stages", "use 1"]),
        ({"name": "zb-h1", "virtual": 3}, ["zb-h1 has one stage", "3 virtual stages"]),
        ({"name": "zb-v"}, ["zb-v has 2 stages per rank", "1 virtual stages", "use 2"]),
        ({"name": "dualpipe-v", "virtual": 4}, ["dualpipe-v has 2 stages per rank", "4 virtual stages"]),
        ({"group_size": 4}, ["stage 4 has no meaning for --pipeline-schedule 1f1b", "use --pipeline-schedule inter"]),
        ({"name": "interleaved", "group_size": 3, "virtual": 2}, ["stage 3 is under the 4 pipeline ranks"]),
        ({"name": "interleaved", "group_size": 0, "virtual": 2}, ["stage 0 is under the 4 pipeline ranks"]),
        ({"name": "breadth-first", "virtual": 0}, ["0 stages per rank", "at least 1"]),
        ({"num_ranks": 0}, ["0 pipeline ranks", "at least 1"]),
        ({"num_microbatches": 0}, ["0 microbatches", "at least 1"]),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_sentence(options, words):
    options = {"name": "1f1b", "num_ranks": 4, "num_microbatches": 4} | options
    with pytest.raises(ScheduleError) as caught:
        build_schedule(options.pop("name"), **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (by_hand("F0 F1 B0", "F0 B0 F1 B1"), "stage 0, mb 1 has the steps 'F'"),
        (by_hand("F0 B0 B0", "F0 B0"), r"B\(stage 0, mb 0\) stands there twice"),
        (by_hand("F0 B0 W0", "F0 B0"), "stage 0, mb 0 has the steps 'FBW'"),
        (by_hand("F0 I0", "F0 I0 W0"), "stage 0, mb 0 has the steps 'FI'"),
        (by_hand("F0 B0", "B0 F0"), r"rank 1 has B\(stage 1, mb 0\) before F\(stage 1, mb 0\)"),
        (by_hand("F0 W0 I0", "F0 B0"), r"rank 0 has W\(stage 0, mb 0\) before I\(stage 0, mb 0\)"),
        (Schedule("s", 1, 1, ((Step(Op.F, 0, 0),), ()), (1,)), "lives on rank 1"),
        (Schedule("s", 1, 1, ((Step(Op.F, 0, 1),),), (0,)), "outside of 1 stages"),
        (Schedule("s", 2, 1, ((Step(Op.F, 0, 0),),), (0,)), "does not place 2 stages"),
        (Schedule("s", 1, 0, ((),), (0,)), "0 microbatches"),
        (
            Schedule("s", 2, 1, ((Step(Op.F, 1, 0), Step(Op.F, 0, 0)),), (0, 0)),
            r"rank 0 has F\(stage 1, mb 0\) before F\(stage 0, mb 0\)",
        ),
    ],
)
def test_check_names_the_first_fault(schedule, words):
    with pytest.raises(ScheduleError, match=words):
        check(schedule)


def test_needs_follow_the_split_of_the_next_stages_backward():
    schedule = by_hand("F0 F1 B0 B1", "F0 F1 I0 B1 W0")
    check(schedule)
    present = set(schedule.steps())
    assert needs(Step(Op.B, 0, 0), 2, present) == (Step(Op.F, 0, 0), Step(Op.I, 1, 0))
    assert needs(Step(Op.B, 0, 1), 2, present) == (Step(Op.F, 0, 1), Step(Op.B, 1, 1))
    assert needs(Step(Op.W, 1, 0), 2, present) == (Step(Op.I, 1, 0),)
    assert needs(Step(Op.F, 0, 0), 2, present) == ()
    assert handover(Step(Op.W, 1, 0), schedule) is None
    assert handover(Step(Op.F, 0, 0), schedule) == (1, 1)
    assert handover(Step(Op.I, 1, 0), schedule) == (0, 0)
