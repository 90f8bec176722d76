"""ZB-H1 and ZB-H2 against the bubbles and the memory of their paper.

The paper takes F, I and W for about equal; its figures hold where W is no longer than F and I, and so the tests draw.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.pipeline.orders.named import one_f_one_b
from megatron3d.pipeline.orders.zero_bubble import zb_h1, zb_h2
from megatron3d.pipeline.schedule import Op, Step
from megatron3d.pipeline.simulate import Costs, simulate

RANKS = st.integers(1, 16)
MICROBATCHES = st.integers(1, 64)


def row_of(text: str, stage: int) -> tuple[Step, ...]:
    """A row written as "F0 I0 ..." for one stage."""
    return tuple(Step(Op(word[0]), stage, int(word[1:])) for word in text.split())


@st.composite
def short_weights(draw: st.DrawFn) -> Costs:
    """Whole costs, so that times are exact, with W no longer than F and I."""
    f, i = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    w = draw(st.integers(1, min(f, i)))
    return Costs(forward=f, backward=i + w, input_grad=i, weight_grad=w)


@settings(max_examples=60, deadline=None)
@given(RANKS, MICROBATCHES, short_weights())
def test_zb_h1_idles_p_minus_1_times_f_plus_i_minus_w(p, m, costs):
    f, i, w = costs.forward, costs.input_grad, costs.weight_grad
    timeline = simulate(zb_h1(p, m), costs)
    saved = min(m, p) - 1  # fewer microbatches than ranks have fewer weight gradients to fill with
    assert timeline.span == m * (f + i + w) + (p - 1) * (f + i) - saved * w
    if m >= p:
        assert timeline.idle == ((p - 1) * (f + i - w),) * p
        assert max(timeline.idle_inside) == (p - 1) * (f + i - w)
        assert max(simulate(one_f_one_b(p, m), costs).idle) == (p - 1) * (f + i + w)


@settings(max_examples=40, deadline=None)
@given(RANKS, MICROBATCHES, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_long_weight_gradients_leave_zb_h1_the_bubble_of_its_longer_half(p, m, f, i, w):
    if m >= p:
        costs = Costs(forward=f, backward=i + w, input_grad=i, weight_grad=w)
        assert simulate(zb_h1(p, m), costs).idle == ((p - 1) * max(f + i - w, f, i),) * p


@settings(max_examples=40, deadline=None)
@given(RANKS, MICROBATCHES)
def test_zb_h1_holds_p_microbatches_on_every_rank_and_zb_h2_2p_minus_1(p, m):
    assert simulate(zb_h1(p, m)).peak_live_activations == (min(p, m),) * p
    assert simulate(zb_h2(p, m)).peak_live_activations == (min(2 * p - 1, m),) * p


@settings(max_examples=60, deadline=None)
@given(RANKS, st.integers(0, 33), short_weights())
def test_zb_h2_idles_at_most_p_minus_1_times_f_plus_i_minus_2w_at_work(p, more, costs):
    f, i, w = costs.forward, costs.input_grad, costs.weight_grad
    timeline = simulate(zb_h2(p, 2 * p - 1 + more), costs)
    assert max(timeline.idle_inside) == (p - 1) * (f + i - 2 * w)
    assert timeline.idle == ((p - 1) * max(f + i - 2 * w, f),) * p  # with the last rank's late start


@settings(max_examples=30, deadline=None)
@given(RANKS, st.integers(0, 33))
def test_zb_h2_has_no_bubble_with_equal_halves(p, more):
    timeline = simulate(zb_h2(p, 2 * p - 1 + more))
    assert timeline.idle_inside == (0.0,) * p


@settings(max_examples=30, deadline=None)
@given(RANKS, MICROBATCHES, short_weights())
def test_more_memory_never_makes_the_step_longer(p, m, costs):
    spans = [simulate(order(p, m), costs).span for order in (one_f_one_b, zb_h1, zb_h2)]
    assert spans[0] >= spans[1]
    assert spans[1] >= spans[2] or m < 2 * p - 1  # fewer cannot feed the longer start of ZB-H2


def test_zb_h1_rows_worked_out_by_hand():
    rows = zb_h1(3, 4).rows
    assert rows[0] == row_of("F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3", 0)
    assert rows[1] == row_of("F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3", 1)
    assert rows[2] == row_of("F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3", 2)


def test_zb_h2_rows_worked_out_by_hand():
    rows = zb_h2(2, 4).rows
    assert rows[0] == row_of("F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3", 0)
    assert rows[1] == row_of("F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3", 1)
