"""The automatic choice: the shortest order that fits, by figures that can be read off each order alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.orders.choose import choose
from megatron3d.pipeline.orders.named import build_schedule
from megatron3d.pipeline.simulate import Costs, Timeline, simulate

WHOLE = Costs(forward=1.0, backward=2.0, input_grad=1.0, weight_grad=1.0)


def share(virtual: int) -> Costs:
    """A stage of `virtual` per rank has its share of the work of a whole rank."""
    times = (WHOLE.forward, WHOLE.backward, WHOLE.input_grad, WHOLE.weight_grad)
    return Costs(*(time / virtual for time in times))


def peak_up_to(limit: float):
    """A memory limit in microbatches on a whole rank."""
    return lambda timeline: max(timeline.peak_in_ranks) <= limit


def always(timeline: Timeline) -> bool:
    """No memory limit."""
    return True


def test_all_orders_that_train_are_considered_where_they_can_run():
    found = choose(4, 8, (1, 2, 4), share, always).considered
    assert [(one.name, one.virtual) for one in found] == [
        ("gpipe", 1),
        ("1f1b", 1),
        ("interleaved", 2),
        ("interleaved", 4),
        ("breadth-first", 2),
        ("breadth-first", 4),
        ("zb-h1", 1),
        ("zb-h2", 1),
        ("zb-v", 2),
        ("dualpipe-v", 2),
    ]


def test_figures_are_those_of_the_simulation_and_comparable():
    found = choose(4, 16, (1, 2), share, always)
    for one in found.considered:
        schedule = build_schedule(one.name, num_ranks=4, num_microbatches=16, virtual=one.virtual)
        timeline = simulate(schedule, share(one.virtual))
        assert (one.span, one.bubble) == (timeline.span, timeline.bubble_fraction)
        assert one.peak == max(timeline.peak_in_ranks)
        assert timeline.busy == pytest.approx([48.0] * 4)  # the same work for all


def test_equal_halves_and_two_stages_per_rank_choose_zb_v():
    found = choose(4, 16, (1, 2), share, always)
    assert (found.name, found.virtual) == ("zb-v", 2)
    assert min(one.span for one in found.considered) == 48 + 1.5  # (p - 1) forwards of half a rank


def test_one_stage_per_rank_chooses_the_zero_bubble_order_with_less_memory():
    # With equal halves ZB-H1 and ZB-H2 end together where ranks wait for each other; ZB-H1 holds p instead of 2p - 1.
    assert choose(4, 16, (1,), share, always).name == "zb-h1"


def test_one_rank_chooses_1f1b_which_holds_one_microbatch():
    found = choose(1, 8, (1, 2), share, always)
    assert (found.name, found.virtual) == ("1f1b", 1)


def test_a_split_that_costs_too_much_leaves_whole_backwards():
    def dear(virtual: int) -> Costs:
        return replace(share(virtual), input_grad=2.0 / virtual, weight_grad=1.5 / virtual)

    assert choose(4, 16, (1,), dear, always).name == "1f1b"


def test_what_does_not_fit_is_dropped_and_says_so():
    # On a whole rank: ZB-V, ZB-H1 and 1F1B hold 4 microbatches, DualPipeV 4.5, interleaved 5.5, ZB-H2 7, others 16.
    found = choose(4, 16, (1, 2), share, peak_up_to(4))
    assert found.name == "zb-v"
    dropped = {one.name for one in found.considered if one.dropped}
    assert dropped == {"gpipe", "interleaved", "breadth-first", "zb-h2", "dualpipe-v"}
    assert all("memory limit" in one.dropped for one in found.considered if one.dropped)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 24), st.floats(0.5, 20))
def test_nothing_that_fits_is_shorter(p, m, limit):
    try:
        found = choose(p, m, (1, 2), share, peak_up_to(limit))
    except ScheduleError:
        assert limit < 1 or limit < min(p, m)  # 1F1B holds min(p, m) on its first rank
        return
    chosen = next(one for one in found.considered if (one.name, one.virtual) == (found.name, found.virtual))
    assert not chosen.dropped and chosen.peak <= limit
    for one in found.considered:
        assert bool(one.dropped) == (one.peak > limit)
        assert one.dropped or one.span >= chosen.span * (1 - 1e-8)


def test_nothing_that_fits_is_an_error_that_names_the_closest():
    with pytest.raises(ScheduleError, match=r"none of the 8 orders fits.*holds the least, activations of 4 microb"):
        choose(4, 16, (1, 2), share, lambda timeline: False)


def test_a_number_of_stages_that_no_order_takes_is_refused():
    with pytest.raises(ScheduleError, match=r"no order for \[\] stages per rank"):
        choose(4, 16, (), share, always)
