"""Simulated times against times worked out by hand and against closed formulas."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.orders.named import gpipe, one_f_one_b
from megatron3d.pipeline.schedule import Op, Schedule, Step
from megatron3d.pipeline.simulate import Costs, peak_live, peak_live_in_ranks, simulate


def steps(text: str) -> tuple[Step, ...]:
    """Steps written as op, stage, mb: "F00 B00"."""
    return tuple(Step(Op(word[0]), int(word[1]), int(word[2])) for word in text.split())


def times(schedule: Schedule, costs: Costs | None = None) -> dict[str, tuple[float, float]]:
    """Start and end of each step under its short name."""
    timeline = simulate(schedule, costs)
    return {f"{t.step.op.value}{t.step.stage}{t.step.mb}": (t.start, t.end) for t in timeline.steps}


def test_two_ranks_of_1f1b_run_at_the_times_worked_out_by_hand():
    assert times(one_f_one_b(2, 2)) == {
        "F00": (0, 1),
        "F01": (1, 2),
        "F10": (1, 2),
        "B10": (2, 4),
        "F11": (4, 5),
        "B00": (4, 6),
        "B11": (5, 7),
        "B01": (7, 9),
    }


def test_latency_and_bandwidth_delay_what_crosses_ranks_and_share_the_link():
    costs = Costs(link_latency=0.25, link_bandwidth=10.0, message_bytes=20.0)  # 2 on the wire, then 0.25
    found = times(gpipe(2, 2), costs)
    assert found["F10"] == (3.25, 4.25)  # 1 + 2 + 0.25
    assert found["F11"] == (5.25, 6.25)  # the second message waits until the link is free at 3
    assert found["B10"] == (6.25, 8.25)
    assert found["B00"] == (10.5, 12.5)


def test_a_handover_on_the_same_rank_is_free():
    schedule = Schedule("both here", 2, 1, (steps("F00 F10 B10 B00"),), (0, 0))
    timeline = simulate(schedule, Costs(link_latency=100.0))
    assert (timeline.span, timeline.bubble_fraction, timeline.peak_live_activations) == (6.0, 0.0, (2,))


def test_stage_factors_make_the_slow_stage_the_clock():
    timeline = simulate(gpipe(3, 8), Costs(stage_factors=(1.0, 2.0, 1.0)))
    assert timeline.span == (1 + 8 * 2 + 1) + (2 + 8 * 4 + 2)
    assert timeline.busy == (24, 48, 24)
    assert timeline.idle == (timeline.span - 24, timeline.span - 48, timeline.span - 24)


def test_weight_gradients_fill_the_bubble_and_keep_activations_alive():
    rows = (steps("F00 F01 I00 W00 I01 W01"), steps("F10 I10 F11 I11 W10 W11"))
    timeline = simulate(Schedule("split", 2, 2, rows, (0, 1)))
    assert timeline.span == 7.0  # full backwards take 9, see the first test
    assert timeline.busy == (6.0, 6.0)
    assert timeline.peak_live_activations == (2, 2)  # the last rank of 1F1B with full backwards holds 1


def test_idle_time_inside_a_rank_starts_with_its_first_step_and_ends_with_its_last():
    timeline = simulate(one_f_one_b(2, 2))  # rank 0 works from 0 to 9, rank 1 from 1 to 7, each for 6
    assert timeline.idle == (3.0, 3.0)
    assert timeline.idle_inside == (3.0, 0.0)


def test_live_activations_count_by_the_share_of_their_stage():
    schedule = Schedule("both here", 2, 1, (steps("F00 F10 B10 B00"),), (0, 0))
    assert simulate(schedule).peak_in_ranks == (1.0,)  # two halves of the only rank
    rows = (steps("F00 F01 B00 B01"), steps("F10 F11 B10 B11"))
    uneven = simulate(Schedule("uneven", 2, 2, rows, (0, 1)), Costs(stage_factors=(3.0, 1.0)))
    assert uneven.peak_live_activations == (2, 2)
    assert uneven.peak_in_ranks == (3.0, 1.0)  # the first stage is 3/4 of the model, that is 1.5 of two ranks
    assert peak_live_in_ranks(uneven.schedule, (6.0, 2.0)) == (3.0, 1.0)


def test_a_forward_without_backward_holds_its_stage_only_while_it_runs():
    schedule = Schedule("forwards", 2, 2, (steps("F00 F01"), steps("F10 F11")), (0, 1))
    assert peak_live(schedule) == (1, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 16), st.floats(0.1, 10), st.floats(0.1, 10))
def test_gpipe_takes_m_plus_p_minus_1_slots_at_any_cost(p, m, forward, backward):
    timeline = simulate(gpipe(p, m), Costs(forward=forward, backward=backward))
    assert timeline.span == pytest.approx((m + p - 1) * (forward + backward))
    assert timeline.busy == pytest.approx((m * (forward + backward),) * p)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 16), st.floats(0, 5), st.floats(0, 5))
def test_slower_links_never_make_the_span_shorter(p, m, latency, more):
    schedule = one_f_one_b(p, m)
    near = simulate(schedule, Costs(link_latency=latency)).span
    far = simulate(schedule, Costs(link_latency=latency + more)).span
    assert near <= far + 1e-9
    assert near >= (m + p - 1) * 3 + 2 * (p - 1) * latency - 1e-9  # one microbatch crosses every link twice


def test_the_timeline_stands_in_an_order_that_respects_rows():
    timeline = simulate(one_f_one_b(4, 6))
    for rank, row in enumerate(timeline.schedule.rows):
        assert tuple(timed.step for timed in timeline.steps if timed.rank == rank) == row
    assert [timed.end for timed in timeline.steps] == sorted(timed.end for timed in timeline.steps)


def test_a_deadlock_is_told_as_who_waits_for_what():
    rows = (steps("F00 B00 F01 B01"), steps("F10 F11 B10 B11"))
    with pytest.raises(ScheduleError) as caught:
        simulate(Schedule("crossed", 2, 2, rows, (0, 1)))
    sentence = str(caught.value)
    assert "rank 0 waits before B(stage 0, mb 0) for B(stage 1, mb 0) of rank 1" in sentence
    assert "rank 1 waits before F(stage 1, mb 1) for F(stage 0, mb 1) of rank 0" in sentence
    assert "'crossed' deadlocks" in sentence


def test_a_rank_that_only_follows_is_left_out_of_the_circle():
    rows = (steps("F00 F01 B00 B01"), steps("F10 B10 F11 B11"), steps("F20 F21 B20 B21"))
    with pytest.raises(ScheduleError) as caught:
        simulate(Schedule("tail", 3, 2, rows, (0, 1, 2)))
    assert "rank 0 waits" not in str(caught.value)
    assert "rank 1 waits before B(stage 1, mb 0) for B(stage 2, mb 0) of rank 2" in str(caught.value)


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        (Costs(forward=0.0), "must be positive"),
        (Costs(link_latency=-1.0), "must be positive"),
        (Costs(stage_factors=(1.0,)), "1 stage factors"),
        (Costs(backward=float("nan")), "must be positive"),
    ],
)
def test_costs_that_cannot_be_are_refused(costs, words):
    with pytest.raises(ScheduleError, match=words):
        simulate(gpipe(2, 2), costs)
