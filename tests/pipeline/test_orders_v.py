"""ZB-V and DualPipeV against the bubbles and the memory that their papers give, and rows worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.orders.named import one_f_one_b
from megatron3d.pipeline.orders.placement import v_shape
from megatron3d.pipeline.orders.v_shaped import dualpipe_v, zb_v
from megatron3d.pipeline.orders.zero_bubble import zb_h1
from megatron3d.pipeline.schedule import Op, Step
from megatron3d.pipeline.simulate import Costs, simulate

RANKS = st.integers(1, 16)
MICROBATCHES = st.integers(1, 64)


def row_of(text: str) -> tuple[Step, ...]:
    """A row written as op, microbatch, slash, stage: "F0/0 I0/3"."""
    words = ([*word[1:].split("/"), word[0]] for word in text.split())
    return tuple(Step(Op(op), int(stage), int(mb)) for mb, stage, op in words)


def halves(f: int, i: int, w: int) -> Costs:
    """Costs of one stage, half a rank."""
    return Costs(forward=f, backward=i + w, input_grad=i, weight_grad=w)


@settings(max_examples=40, deadline=None)
@given(RANKS, st.integers(0, 33))
def test_zb_v_has_no_bubble_with_equal_halves(p, more):
    timeline = simulate(zb_v(p, 2 * p - 1 + more))
    assert timeline.idle_inside == (0.0,) * p
    assert timeline.idle == (p - 1.0,) * p  # the last rank's late start, in forwards of half a rank


@settings(max_examples=40, deadline=None)
@given(RANKS, st.integers(0, 33), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_zb_v_idles_by_what_the_input_half_is_longer(p, more, w, longer_f, longer_i):
    f, i = w + longer_f, w + longer_f + longer_i  # W <= F <= I
    timeline = simulate(zb_v(p, 2 * p - 1 + more), halves(f, i, w))
    assert max(timeline.idle_inside) == 2 * (p - 1) * (i - w)


@settings(max_examples=40, deadline=None)
@given(RANKS, MICROBATCHES)
def test_zb_v_holds_what_the_first_rank_of_1f1b_holds(p, m):
    timeline = simulate(zb_v(p, m))
    assert max(timeline.peak_live_activations) <= min(2 * p, 2 * m)
    assert max(timeline.peak_in_ranks) <= max(simulate(one_f_one_b(p, m)).peak_in_ranks) == min(p, m)
    if m >= 2 * p - 1:
        assert timeline.peak_live_activations == (2 * p,) * p


@settings(max_examples=40, deadline=None)
@given(RANKS, MICROBATCHES)
def test_zb_v_is_never_longer_than_zb_h1_on_the_same_model(p, m):
    whole, half = Costs(), Costs(stage_factors=(0.5,) * (2 * p))
    assert simulate(zb_v(p, m), half).span <= simulate(zb_h1(p, m), whole).span


@settings(max_examples=60, deadline=None)
@given(RANKS, st.integers(0, 32), st.integers(1, 9), st.integers(1, 9), st.data())
def test_dualpipe_v_idles_no_more_than_deepseek_says(p, more, i, f, data):
    w = data.draw(st.integers(1, min(f, i)))
    f = min(f, i + w)  # no forward is longer than a full backward
    timeline = simulate(dualpipe_v(p, 2 * p + more), halves(f, i, w))
    pair, backward = f + i + w, i + w  # F&B one after the other, and B
    published = (p - 1) * (pair + backward - 3 * w)  # PP / 2 - 1 = p - 1 for PP = 2p stages
    assert max(timeline.idle) <= published
    assert max(timeline.idle_inside) <= published


@settings(max_examples=40, deadline=None)
@given(RANKS, MICROBATCHES)
def test_dualpipe_v_holds_one_more_than_there_are_stages(p, m):
    peaks = simulate(dualpipe_v(p, m)).peak_live_activations
    assert max(peaks) <= min(2 * p + 1, 2 * m)
    if m > 2 * p:
        assert peaks == (2 * p + 1,) * p


@settings(max_examples=30, deadline=None)
@given(RANKS, MICROBATCHES)
def test_dualpipe_v_splits_backwards_only_at_the_ends(p, m):
    split = {(step.stage, step.mb) for step in dualpipe_v(p, m).steps() if step.op is Op.I}
    assert all(mb < p - 1 or mb >= m - 2 * p for _, mb in split)


def test_zb_v_rows_worked_out_by_hand():
    rows = zb_v(2, 3).rows
    assert rows[0] == row_of(
        "F0/0 F1/0 F2/0 F0/3 I0/3 W0/3 F1/3 I1/3 W1/3 I0/0 W0/0 F2/3 I2/3 W2/3 I1/0 W1/0 I2/0 W2/0"
    )
    assert rows[1] == row_of(
        "F0/1 F0/2 F1/1 F1/2 I0/2 W0/2 F2/1 I0/1 W0/1 F2/2 I1/2 W1/2 I1/1 I2/2 I2/1 W1/1 W2/2 W2/1"
    )


def test_dualpipe_v_rows_worked_out_by_hand():
    rows = dualpipe_v(2, 4).rows
    first = "F0/0 F1/0 F2/0 F0/3 I0/3 W0/3 F1/3 F3/0 B1/3 F2/3 B0/0 B2/3 F3/3 B1/0 B3/3 I2/0 W2/0 I3/0 W3/0"
    second = "F0/1 F0/2 F1/1 F1/2 F2/1 B0/2 F2/2 B0/1 F3/1 B1/2 F3/2 B1/1 B2/2 B2/1 I3/2 I3/1 W3/2 W3/1"
    assert rows == (row_of(first), row_of(second))


def test_a_v_of_other_than_two_stages_per_rank_is_refused():
    with pytest.raises(ScheduleError, match="2 stages per rank, but 3"):
        v_shape(4, 3)
    with pytest.raises(ScheduleError, match="zb-v has 2 stages per rank, but 1"):
        zb_v(4, 8, 1)
