"""FlatLayout: every parameter has a place of its own, and parameters that are treated alike lie side by side."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.errors import ConfigError
from megatron3d.params.spec import Init, ParamSpec
from megatron3d.zero.flat import ALIGNMENT, FlatLayout, Span, flat_layout
from megatron3d.zero.policy import policy_of

DEGREES = st.sampled_from([1, 2, 4])


@st.composite
def spec_lists(draw: st.DrawFn) -> list[ParamSpec]:
    """Parameters of every treatment, in any order."""
    specs = []
    for number in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["sharded", "equal", "partial"]))
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=2)))
        if kind == "sharded":
            shape = (4 * shape[0], *shape[1:])
        specs.append(
            ParamSpec(
                f"p{number}",
                shape,
                Init("zeros"),
                decays=draw(st.booleans()),
                tp_dim=0 if kind == "sharded" else None,
                tp_gradient=kind,
                tied_copy=draw(st.booleans()),
                is_table=draw(st.booleans()),
            )
        )
    return specs


def treatment(spec: ParamSpec) -> tuple[bool, bool, str, bool]:
    return (spec.decays, spec.is_hidden_matrix, spec.tp_gradient, spec.tied_copy)


def slots_within(layout: FlatLayout, span: Span) -> list[ParamSpec]:
    return [slot.spec for slot in layout.slots if slot.span.intersect(span).length]


@given(spec_lists(), DEGREES, DEGREES)
def test_every_parameter_has_a_slot_of_its_local_size_and_no_two_overlap(
    specs: list[ParamSpec], tp: int, num_ranks: int
) -> None:
    layout = flat_layout(specs, tp=tp, num_ranks=num_ranks)
    assert sorted(slot.spec.name for slot in layout.slots) == sorted(spec.name for spec in specs)
    end = 0
    for slot in sorted(layout.slots, key=lambda slot: slot.span.start):
        assert slot.span.start >= end, f"{slot} begins inside the slot before"
        assert slot.shape == slot.spec.local_shape(tp) and slot.span.length == prod(slot.shape)
        end = slot.span.stop
    assert end <= layout.length


@given(spec_lists(), DEGREES, DEGREES)
def test_segments_are_aligned_ordered_and_full_of_slots_treated_alike(
    specs: list[ParamSpec], tp: int, num_ranks: int
) -> None:
    layout = flat_layout(specs, tp=tp, num_ranks=num_ranks)
    assert len(layout.segments) == len({treatment(spec) for spec in specs})
    end = 0
    for segment in layout.segments:
        inside = slots_within(layout, segment.span)
        alike = (segment.decays, segment.is_hidden_matrix, segment.tp_gradient, segment.tied_copy)
        assert inside == [spec for spec in specs if treatment(spec) == alike], "their order is kept"
        assert segment.span.length == sum(prod(spec.local_shape(tp)) for spec in inside), "no gap inside"
        assert segment.span.start % ALIGNMENT == 0 and 0 <= segment.span.start - end < ALIGNMENT
        end = segment.span.stop
    decays = [segment.decays for segment in layout.segments]
    assert decays == sorted(decays, reverse=True), "those that decay come first"


@given(spec_lists(), DEGREES, DEGREES)
def test_the_length_is_the_smallest_that_gives_every_rank_an_equal_aligned_slice(
    specs: list[ParamSpec], tp: int, num_ranks: int
) -> None:
    layout = flat_layout(specs, tp=tp, num_ranks=num_ranks)
    multiple = num_ranks * ALIGNMENT
    end = max(slot.span.stop for slot in layout.slots)
    assert layout.length % multiple == 0 and end <= layout.length < end + multiple
    slices = [layout.slice_of(rank, num_ranks) for rank in range(num_ranks)]
    assert [span.start for span in slices] == [0, *(span.stop for span in slices[:-1])]
    assert slices[-1].stop == layout.length and len({span.length for span in slices}) == 1


@given(spec_lists(), DEGREES, DEGREES)
def test_optimizer_spans_of_all_slices_hold_each_element_once_under_its_own_treatment(
    specs: list[ParamSpec], tp: int, num_ranks: int
) -> None:
    layout = flat_layout(specs, tp=tp, num_ranks=num_ranks)
    found: dict[int, tuple[bool, int]] = {}
    for rank in range(num_ranks):
        within = layout.slice_of(rank, num_ranks)
        for number, (decays, span) in enumerate(layout.optimizer_spans(within)):
            assert within.start <= span.start < span.stop <= within.stop
            for element in range(span.start, span.stop):
                assert element not in found, f"element {element} is in two spans"
                found[element] = decays, rank, number
    inside: dict[tuple[int, int], set[tuple[bool, bool]]] = {}
    for slot in layout.slots:
        for element in range(slot.span.start, slot.span.stop):
            decays, *place = found[element]
            assert decays == slot.spec.decays
            inside.setdefault(tuple(place), set()).add((decays, slot.spec.is_hidden_matrix))
    assert all(len(kinds) == 1 for kinds in inside.values()), "a span holds parameters of one treatment"


@given(*[st.integers(0, 20)] * 4)
def test_spans_intersect_as_sets_of_numbers(a: int, b: int, c: int, d: int) -> None:
    first, second = Span(min(a, b), max(a, b)), Span(min(c, d), max(c, d))
    common = first.intersect(second)
    assert list(range(100))[common.slice] == sorted(
        set(range(first.start, first.stop)) & set(range(second.start, second.stop))
    )


def test_policies_share_out_what_the_stage_says_and_unknown_stages_are_refused() -> None:
    assert not policy_of(0).shard_optimizer and policy_of(1).shard_optimizer
    assert not policy_of(1).shard_grads and not policy_of(1).shard_params
    assert policy_of(2).shard_grads and not policy_of(2).shard_params
    assert policy_of(3).shard_optimizer and policy_of(3).shard_grads and policy_of(3).shard_params
    with pytest.raises(ConfigError, match=r"--zero-stage 7 is not a stage of ZeRO; use 0, 1, 2, 3"):
        policy_of(7)
