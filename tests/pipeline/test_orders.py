"""Every named order is complete and ordered at any size, and has the bubble and the memory the papers give."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.orders import ORDERS, build_schedule, forward_only, gpipe, one_f_one_b
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


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(ORDERS)), RANKS, MICROBATCHES)
def test_every_order_has_each_step_exactly_once_and_never_deadlocks(name, num_ranks, num_microbatches):
    schedule = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    ops = [Op.F] if name == "forward-only" else [Op.F, Op.B]
    cells = [(stage, mb) for stage in range(num_ranks) for mb in range(num_microbatches)]
    assert Counter(schedule.steps()) == Counter(Step(op, stage, mb) for op in ops for stage, mb in cells)
    ends = {timed.step: timed.end for timed in simulate(schedule).steps}
    for timed in simulate(schedule).steps:
        op, stage, mb = timed.step
        before = Step(Op.F, stage - 1, mb) if op is Op.F else Step(Op.B, stage + 1, mb)
        assert before not in ends or ends[before] <= timed.start
        assert op is Op.F or ends[Step(Op.F, stage, mb)] <= timed.start


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(ORDERS)), RANKS, MICROBATCHES)
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "1F1B"}, ["'1F1B'", "gpipe, 1f1b, forward-only", "did you mean '1f1b'"]),
        ({"name": "forward_only"}, ["did you mean 'forward-only'"]),
        ({"name": "zzz"}, ["'zzz'", "gpipe, 1f1b, forward-only"]),
        ({"virtual": 2}, ["1f1b", "2 virtual stages"]),
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
