"""Blends: within one sample of the weights at every prefix, each sample of a corpus in turn, pure in the number."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.data.blend import (
    MAX_PERIOD,
    Blend,
    BlendOrder,
    BlendSegment,
    Corpus,
    fair_turns,
    integer_weights,
    parse_data_path,
    tempered,
)
from megatron3d.data.mock import MockSamples
from megatron3d.errors import ConfigError, DataError


def blend_of(weights: tuple[int, ...]) -> Blend:
    streams = [MockSamples(str(i), seq_length=4, vocab_size=50, eod_token=None, seed=i) for i in range(len(weights))]
    return Blend(streams, BlendOrder.constant(weights))


def largest_error(turns: np.ndarray, weights: tuple[int, ...]) -> Fraction:
    """max over prefixes n and corpora i of |served - n*p/q|, exactly."""
    period, n = sum(weights), np.arange(1, len(turns) + 1)
    worst = max(np.abs(np.cumsum(turns == i) * period - n * weight).max() for i, weight in enumerate(weights))
    return Fraction(int(worst), period)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_proportions_are_within_one_sample_at_every_prefix(weights: list[int]) -> None:
    turns = fair_turns(weights)
    assert largest_error(turns, tuple(weights)) < 1
    assert np.bincount(turns, minlength=len(weights)).tolist() == weights


@pytest.mark.parametrize("weights", [(30000, 30000, 5535, 1), (1,) * 200, (40000, *[7] * 300)])
def test_long_periods_are_as_fair(weights: tuple[int, ...]) -> None:
    assert largest_error(fair_turns(weights), weights) < 1


def test_each_corpus_gives_its_samples_in_turn() -> None:
    blend = blend_of((5, 2, 1))
    served = Counter()
    for number in range(100):
        corpus, own_number = blend.choose(number)
        assert own_number == served[corpus]
        served[corpus] += 1


def test_far_sample_is_found_without_the_ones_before_it() -> None:
    blend = blend_of((7, 3))
    corpus, own_number = blend.choose(10**15 + 4)
    near, near_number = blend.choose(4)
    assert (corpus, own_number) == (near, near_number + 10**14 * (7, 3)[near])
    assert blend.sample(10**15 + 4).tolist() == blend.streams[corpus].sample(own_number).tolist()


@st.composite
def segments_and_end(draw: st.DrawFn) -> tuple[list[BlendSegment], int]:
    """Up to five segments of up to four corpora, some of them without weight, and a number of samples beyond."""
    num_corpora = draw(st.integers(1, 4))
    weights = st.lists(st.integers(0, 9), min_size=num_corpora, max_size=num_corpora).filter(any)
    firsts = [0, *sorted(draw(st.sets(st.integers(1, 200), max_size=4)))]
    return [BlendSegment(first, tuple(draw(weights))) for first in firsts], firsts[-1] + draw(st.integers(0, 60))


@settings(max_examples=150, deadline=None)
@given(segments_and_end())
def test_no_sample_is_repeated_or_lost_over_any_segments(drawn: tuple[list[BlendSegment], int]) -> None:
    """Each corpus counts for itself, and within a segment it is less than one sample away from its due."""
    segments, end = drawn
    order = BlendOrder(segments)
    served = Counter()
    for number in range(end):
        corpus, own_number = order.choose(number)
        segment = [one for one in segments if one.first_sample <= number][-1]
        assert segment.weights[corpus] > 0
        assert own_number == served[corpus]
        served[corpus] += 1
        due = Fraction((number + 1 - segment.first_sample) * segment.weights[corpus], sum(segment.weights))
        assert abs(served[corpus] - order.served(segment.first_sample)[corpus] - due) < 1
    assert order.served(end) == tuple(served[corpus] for corpus in range(len(segments[0].weights)))


@settings(max_examples=50, deadline=None)
@given(segments_and_end())
def test_samples_before_a_segment_are_what_they_were_without_it(drawn: tuple[list[BlendSegment], int]) -> None:
    segments, _ = drawn
    order, before = BlendOrder(segments), BlendOrder(segments[:-1] or segments)
    last = segments[-1].first_sample
    assert [order.choose(number) for number in range(last)] == [before.choose(number) for number in range(last)]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([BlendSegment(1, (1,))], "do not rise from 0"),
        ([BlendSegment(0, (1,)), BlendSegment(0, (2,))], "do not rise from 0"),
        ([BlendSegment(0, (1,)), BlendSegment(5, (1, 1))], "different numbers"),
        ([BlendSegment(0, (0, 0)), BlendSegment(5, (1, 1))], "at least one must be positive"),
    ],
)
def test_segments_that_make_no_sense_are_refused(segments: list[BlendSegment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlendOrder(segments)


def test_a_corpus_that_has_left_a_blend_is_named_where_it_is_asked_for() -> None:
    stream = MockSamples("0", seq_length=4, vocab_size=50, eod_token=None, seed=0)
    blend = Blend([None, stream], BlendOrder([BlendSegment(0, (1, 1)), BlendSegment(4, (0, 1))]))
    assert blend.sample(4).tolist() == stream.sample(2).tolist()
    with pytest.raises(DataError, match="sample 0 is of corpus 0 of the blend, which has left it since"):
        blend.sample(0)


def test_negative_sample_is_refused() -> None:
    with pytest.raises(IndexError, match="sample -1 of a blend"):
        blend_of((1,)).choose(-1)


def test_weights_that_fit_are_exact() -> None:
    assert integer_weights([Fraction("0.7"), Fraction("0.3")]) == (7, 3)
    assert integer_weights([30, 70, 25]) == (6, 14, 5)
    assert integer_weights([Fraction("1e-3"), Fraction("0.999")]) == (1, 999)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=20))
def test_weights_that_do_not_fit_are_rounded_to_the_period(weights: list[int]) -> None:
    rounded = integer_weights(weights)
    total = sum(rounded)
    assert total <= MAX_PERIOD and min(rounded) >= 1
    for weight, integer in zip(weights, rounded):
        assert abs(Fraction(weight, sum(weights)) - Fraction(integer, total)) <= Fraction(len(weights), MAX_PERIOD)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=20), st.floats(0.5, 100))
def test_a_temperature_gives_shares_of_sizes_to_the_power_of_its_inverse(sizes: list[int], temperature: float) -> None:
    """By logarithms; weights of a period have a grid of 1/65,536 and are at least one of it."""
    weights = integer_weights(tempered(sizes, temperature))
    logs = np.log(np.array(sizes, dtype=np.float64)) / temperature
    expected = np.exp(logs - np.logaddexp.reduce(logs))
    assert np.array(weights) / sum(weights) == pytest.approx(expected, abs=len(sizes) / MAX_PERIOD)


def test_a_temperature_of_one_is_the_size_and_an_infinite_one_makes_corpora_equal() -> None:
    assert integer_weights(tempered([10**15 + 1, 3 * (10**15 + 1)], 1.0)) == (1, 3)
    assert integer_weights(tempered([5, 10**9, 7], math.inf)) == (1, 1, 1)
    assert integer_weights(tempered([1, 2], 1e-4)) == (1, MAX_PERIOD - 1)  # a power that is 0 in fp64


def test_data_path_with_and_without_weights() -> None:
    weighted = parse_data_path(["0.7", "A", "0.3", "B"], "--data-path")
    assert weighted == (Corpus("A", Fraction(7, 10)), Corpus("B", Fraction(3, 10)))
    assert parse_data_path(["A", "B"], "--data-path") == (Corpus("A", None), Corpus("B", None))
    assert parse_data_path(["A"], "--data-path") == (Corpus("A", None),)
    assert parse_data_path(["1", "A", "0", "B"], "--data-path") == (Corpus("A", Fraction(1)),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0.5", "A", "B", "C"], "--data-path 0.5 A B C: B stands where a weight from 0 up is expected"),
        (["0.5", "A", "-1", "B"], "-1 stands where a weight"),
        (["0", "A", "0", "B"], "all weights are 0"),
    ],
)
def test_weights_that_make_no_sense_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_data_path(words, "--data-path")
