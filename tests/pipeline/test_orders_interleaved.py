"""Interleaved and breadth-first orders against the figures of their papers and against rows worked out by hand."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron3d.pipeline.orders.interleaved import breadth_first, interleaved
from megatron3d.pipeline.orders.named import build_schedule, gpipe, one_f_one_b
from megatron3d.pipeline.schedule import Op, Step
from megatron3d.pipeline.simulate import Costs, simulate

RANKS = st.integers(1, 16)
MICROBATCHES = st.integers(1, 64)
VIRTUAL = st.integers(1, 4)


def row_of(text: str) -> tuple[Step, ...]:
    """A row written as op, microbatch, slash, stage: "F0/0 B0/2"."""
    words = ([*word[1:].split("/"), word[0]] for word in text.split())
    return tuple(Step(Op(op), int(stage), int(mb)) for mb, stage, op in words)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["interleaved", "breadth-first"]), RANKS, MICROBATCHES, VIRTUAL)
def test_virtual_stages_divide_the_bubble_by_their_number(name, p, m, virtual):
    timeline = simulate(build_schedule(name, num_ranks=p, num_microbatches=m, virtual=virtual))
    if m >= p:
        assert timeline.bubble_fraction == pytest.approx((p - 1) / (m * virtual + p - 1), abs=1e-12)
        assert timeline.idle == (3 * (p - 1),) * p  # in stages: 1/virtual of (p - 1)(F + B) of a whole rank
    else:  # each turn but the last takes p forwards: the first microbatch is not back sooner
        assert timeline.span == 3 * ((virtual - 1) * p + m + p - 1)


@settings(max_examples=30, deadline=None)
@given(RANKS, MICROBATCHES, VIRTUAL, st.integers(1, 7), st.integers(1, 7))
def test_the_interleaved_bubble_holds_for_any_ratio_of_forward_to_backward(p, m, virtual, forward, backward):
    assume(m >= p)
    timeline = simulate(interleaved(p, m, virtual), Costs(forward, backward))
    assert timeline.idle == ((p - 1) * (forward + backward),) * p


@settings(max_examples=60, deadline=None)
@given(RANKS, st.integers(1, 4), st.integers(2, 4))
def test_live_activations_are_those_of_the_paper_where_ranks_divide_microbatches(p, groups, virtual):
    m = groups * p
    expected = tuple(min(2 * (p - 1 - rank) + (virtual - 1) * p + 1, m * virtual) for rank in range(p))
    timeline = simulate(interleaved(p, m, virtual))
    assert timeline.peak_live_activations == expected
    assert timeline.peak_in_ranks == pytest.approx([peak / virtual for peak in expected])


@settings(max_examples=60, deadline=None)
@given(RANKS, MICROBATCHES, st.integers(2, 4), st.integers(0, 20))
def test_larger_groups_keep_the_bubble_and_hold_more(p, m, virtual, more):
    assume(m >= p)
    group = p + more
    timeline = simulate(interleaved(p, m, virtual, group_size=group))
    assert timeline.idle == (3 * (p - 1),) * p
    whole, rest = divmod(m, group)
    spread = -(-rest // whole) if whole and rest < p else 0  # what a rest too small for a group adds to each other
    largest = min(group + spread, m)
    for rank, peak in enumerate(timeline.peak_live_activations):
        assert peak == min(2 * (p - 1 - rank) + (virtual - 1) * largest + 1, m * virtual)


@settings(max_examples=30, deadline=None)
@given(RANKS, MICROBATCHES)
def test_with_one_stage_per_rank_they_are_1f1b_and_gpipe(p, m):
    assert interleaved(p, m, 1).rows == one_f_one_b(p, m).rows
    assert breadth_first(p, m, 1).rows == gpipe(p, m).rows


@settings(max_examples=40, deadline=None)
@given(RANKS, MICROBATCHES, VIRTUAL)
def test_breadth_first_visits_each_stage_once_forward_and_once_backward_and_holds_everything(p, m, virtual):
    schedule = breadth_first(p, m, virtual)
    for row in schedule.rows:
        runs = [key for key, _ in groupby((step.op, step.stage) for step in row)]
        assert len(runs) == len(set(runs)) == 2 * virtual
    assert simulate(schedule).peak_live_activations == (m * virtual,) * p


def test_interleaved_rows_are_those_of_the_paper():
    rows = interleaved(2, 4, 2).rows
    assert rows[0] == row_of("F0/0 F1/0 F0/2 F1/2 F2/0 B0/2 F3/0 B1/2 F2/2 B0/0 F3/2 B1/0 B2/2 B3/2 B2/0 B3/0")
    assert rows[1] == row_of("F0/1 F1/1 F0/3 B0/3 F1/3 B1/3 F2/1 B0/1 F3/1 B1/1 F2/3 B2/3 F3/3 B3/3 B2/1 B3/1")


def test_a_rest_under_the_ranks_joins_the_other_groups():
    forwards = [step for step in interleaved(2, 5, 2).rows[0] if step.op is Op.F]
    assert forwards == list(row_of("F0/0 F1/0 F2/0 F0/2 F1/2 F2/2 F3/0 F4/0 F3/2 F4/2"))


def test_a_rest_of_at_least_the_ranks_is_a_group_of_its_own():
    forwards = [step for step in interleaved(2, 5, 2, group_size=3).rows[0] if step.op is Op.F]
    assert forwards == list(row_of("F0/0 F1/0 F2/0 F0/2 F1/2 F2/2 F3/0 F4/0 F3/2 F4/2"))


def test_breadth_first_rows_worked_out_by_hand():
    rows = breadth_first(2, 2, 2).rows
    assert rows[0] == row_of("F0/0 F1/0 F0/2 F1/2 B0/2 B1/2 B0/0 B1/0")
    assert rows[1] == row_of("F0/1 F1/1 F0/3 F1/3 B0/3 B1/3 B0/1 B1/1")
