"""The split of layers over stages, against what any split must satisfy and against counts worked out by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations_with_replacement, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.errors import ConfigError
from megatron3d.pipeline.split.costs import split_by_costs, stage_loads
from megatron3d.pipeline.split.layout import split_by_layout
from megatron3d.pipeline.split.stages import describe, split_layers


def counts(*args: int, **options: int | bool | None) -> list[int]:
    """How many layers each stage has."""
    return [len(layers) for layers in split_layers(*args, **options)]


@given(st.integers(1, 16), st.integers(0, 80), st.booleans(), st.booleans())
def test_a_split_keeps_every_layer_once_and_is_near_even_with_what_is_counted(stages, more, embedding, loss):
    num_layers = max(1, stages + more - embedding - loss)
    split = split_layers(num_layers, stages, count_embedding=embedding, count_loss=loss)
    assert [layer for layers in split for layer in layers] == list(range(num_layers))
    loads = [len(layers) for layers in split]
    loads[0] += embedding
    loads[-1] += loss
    assert len(split) == stages and max(loads) - min(loads) <= 1
    assert min(loads) >= 1


@given(st.integers(3, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 40))
def test_fixed_ends_are_kept_and_the_middle_is_near_even(stages, first, last, more):
    num_layers = first + last + (stages - 2) + more
    sizes = counts(num_layers, stages, first=first, last=last)
    assert (sizes[0], sizes[-1], sum(sizes)) == (first, last, num_layers)
    assert max(sizes[1:-1]) - min(sizes[1:-1]) <= 1


@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ((12, 4), {}, [3, 3, 3, 3]),
        ((13, 4), {}, [3, 4, 3, 3]),
        ((14, 4), {}, [3, 4, 4, 3]),
        ((15, 4), {}, [4, 4, 4, 3]),
        ((3, 2), {}, [2, 1]),
        ((14, 4), {"count_embedding": True, "count_loss": True}, [3, 4, 4, 3]),
        ((6, 4), {"count_embedding": True, "count_loss": True}, [1, 2, 2, 1]),
        ((2, 4), {"count_embedding": True, "count_loss": True}, [0, 1, 1, 0]),
        ((7, 2), {"count_loss": True}, [4, 3]),
        ((10, 4), {"first": 1}, [1, 3, 3, 3]),
        ((10, 4), {"last": 1}, [3, 3, 3, 1]),
        ((10, 4), {"first": 2, "last": 1}, [2, 4, 3, 1]),
        ((10, 4), {"first": 1, "count_loss": True}, [1, 4, 3, 2]),
        ((10, 2), {"first": 3, "last": 7}, [3, 7]),
        ((10, 2), {"first": 3}, [3, 7]),
        ((10, 1), {"count_embedding": True, "count_loss": True}, [10]),
        ((10, 1), {"first": 10}, [10]),
    ],
)
def test_splits_worked_out_by_hand(args, options, expected):
    assert counts(*args, **options) == expected


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        ((3, 4), {}, ["--num-layers 3", "4 pipeline stages"]),
        ((1, 4), {"count_embedding": True, "count_loss": True}, ["--num-layers 1", "4 pipeline stages"]),
        ((0, 1), {}, ["--num-layers 0"]),
        ((4, 0), {}, ["0 pipeline stages"]),
        ((8, 4), {"first": 0}, ["--decoder-first-pipeline-num-layers 0"]),
        ((8, 4), {"first": 6, "last": 1}, ["7 of them fixed on 2", "2 stages would share 1 layers"]),
        ((8, 4), {"first": 9}, ["9 of them fixed on 1", "share 0 layers"]),
        ((10, 2), {"first": 3, "last": 6}, ["9 layers on 2 stages", "--num-layers is 10"]),
        ((8, 2), {"first": 8, "last": 8}, ["16 layers on 2 stages", "--num-layers is 8"]),
        ((10, 1), {"first": 3}, ["--decoder-first-pipeline-num-layers 3", "one pipeline stage"]),
        ((8, 4), {"last": 2, "count_loss": True}, ["--decoder-last-pipeline-num-layers 2", "only one of the two"]),
    ],
)
def test_an_impossible_split_is_refused_with_its_numbers(args, options, words):
    with pytest.raises(ConfigError) as caught:
        split_layers(*args, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_describe_names_what_each_stage_holds():
    assert describe(split_layers(3, 2)) == (
        "stage 0: embedding + layers 0-1 (2), stage 1: layer 2 + output layer and loss"
    )
    assert describe((range(0), range(0, 4), range(4, 4))) == (
        "stage 0: embedding, stage 1: layers 0-3 (4), stage 2: output layer and loss"
    )
    assert describe((range(0, 4),)) == "stage 0: embedding + layers 0-3 (4) + output layer and loss"


# --- Layouts written out ----------------------------------------------------------------------------------------------


def repeated(symbols: str, random: Random) -> str:
    """The same layout written with repetitions, commas and blanks wherever chance puts them."""
    text, at = "", 0
    while at < len(symbols):
        width = random.choice((1, 1, 2, 3))
        unit = symbols[at : at + width]
        times = 1
        while symbols[at + times * width : at + (times + 1) * width] == unit and random.random() < 0.8:
            times += 1
        nested = repeated(unit, random) if width > 1 else unit
        written = f"({nested})" if width > 1 else nested
        text += (f"{written}*{times}" if times > 1 or random.random() < 0.1 else nested) + random.choice(
            ("", "", ",", " ")
        )
        at += times * width
    return text


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_a_layout_however_it_is_written_keeps_every_layer_in_its_stage(sizes, random):
    sizes = [max(size, 1) if 0 < stage < len(sizes) - 1 else size for stage, size in enumerate(sizes)]
    layout = repeated("E" + "|".join("t" * size for size in sizes) + "L", random)
    split = split_by_layout(layout, sum(sizes), len(sizes))
    assert [len(layers) for layers in split] == sizes
    assert [layer for layers in split for layer in layers] == list(range(sum(sizes)))


def test_the_layout_of_the_documentation_reads_as_it_says():
    assert [len(layers) for layers in split_by_layout("Et*3|t*4|(tt|)*2tL", 12, 5)] == [3, 4, 2, 2, 1]
    assert [len(layers) for layers in split_by_layout("E | (t|)*2, tL", 3, 4)] == [0, 1, 1, 1]
    assert [len(layers) for layers in split_by_layout("E((tt|)*2t|)*2 t|L", 11, 8)] == [2, 2, 1, 2, 2, 1, 1, 0]


@pytest.mark.parametrize(
    ("layout", "num_layers", "num_stages", "words"),
    [
        ("Ettt|tttL", 6, 3, ["has 2 stages", "pipeline has 3", "2 bars"]),
        ("Ettt|tttL", 7, 2, ["6 transformer layers (3 + 3)", "--num-layers is 7"]),
        ("tEt|ttL", 4, 2, ["E (embedding)", "first symbol"]),
        ("tt|ttL", 4, 2, ["0 times E"]),
        ("Ett|EttL", 4, 2, ["2 times E"]),
        ("Ett|tt", 4, 2, ["0 times L"]),
        ("Ett|tLt", 4, 2, ["L (output layer and loss)", "last symbol"]),
        ("Ett|ttmL", 4, 2, ["'m'", "multi-token-prediction"]),
        ("Ett||ttL", 4, 3, ["stage 1 of 3 without anything"]),
        ("Ett|(ttL", 4, 2, ["never closed"]),
        ("Ett|tt)L", 4, 2, ["never opened"]),
        ("Ett|t*L", 4, 2, ["'*'", "from 1"]),
        ("Ett|t*0L", 4, 2, ["'*0'"]),
        ("Et*999999|(t*999)*999L", 4, 2, ["which is no model"]),
        ("Ett|*2ttL", 4, 3, ["stage 1 of 3 without anything"]),
        ("*2Ett|ttL", 4, 2, ["'*'", "it takes E"]),
        ("Ett|xtL", 4, 2, ["'x'", "it takes E"]),
        ("", 4, 2, ["0 times E"]),
    ],
)
def test_a_faulty_layout_is_refused_with_what_is_wrong(layout, num_layers, num_stages, words):
    with pytest.raises(ConfigError) as caught:
        split_by_layout(layout, num_layers, num_stages)
    assert all(word in str(caught.value) for word in ["--pipeline-model-parallel-layout", *words]), caught.value


# --- Splits by cost ---------------------------------------------------------------------------------------------------


def all_splits(num_layers: int, num_stages: int, may_be_empty: set[int]) -> Iterator[tuple[range, ...]]:
    """Every way to cut the layers, by brute force."""
    for cuts in combinations_with_replacement(range(num_layers + 1), num_stages - 1):
        split = tuple(range(start, end) for start, end in pairwise((0, *cuts, num_layers)))
        if all(len(layers) or stage in may_be_empty for stage, layers in enumerate(split)):
            yield split


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 12), st.integers(0, 30), st.integers(1, 6))
def test_a_split_by_costs_is_the_best_of_all_splits(costs, embedding, head, stages):
    may_be_empty = ({0} if embedding else set()) | ({stages - 1} if head else set())
    ranked = {
        split: (max(loads), sum(load * load for load in loads))
        for split in all_splits(len(costs), stages, may_be_empty)
        for loads in [stage_loads(split, costs, embedding, head)]
    }
    if not ranked:
        with pytest.raises(ConfigError, match=f"--num-layers {len(costs)} cannot fill {stages} pipeline stages"):
            split_by_costs(costs, embedding, head, stages)
        return
    found = split_by_costs(costs, embedding, head, stages)
    assert ranked[found] == min(ranked.values()), "a KeyError here is a split that is none"
    equals = [tuple(map(len, split)) for split, rank in ranked.items() if rank == ranked[found]]
    assert tuple(map(len, found)) == min(equals)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 16))
def test_a_split_by_costs_keeps_every_layer_once_whatever_the_costs(costs, embedding, head, stages):
    stages = min(stages, len(costs))
    split = split_by_costs(costs, embedding, head, stages)
    assert len(split) == stages
    assert [layer for layers in split for layer in layers] == list(range(len(costs)))
    loads = stage_loads(split, costs, embedding, head)
    average = (sum(costs) + embedding + head) / stages
    assert average * (1 - 1e-9) <= max(loads)


def test_a_large_head_takes_layers_off_the_last_stage():
    assert [len(layers) for layers in split_by_costs([1.0] * 12, 0.0, 3.0, 4)] == [3, 4, 4, 1]
    assert [len(layers) for layers in split_by_costs([1.0] * 8, 0.0, 9.0, 4)] == [2, 3, 3, 0]
    assert [len(layers) for layers in split_by_costs([1.0] * 13, 0.0, 0.0, 4)] == [3, 3, 3, 4]


def test_a_thousand_layers_are_split_in_time():
    start = time.process_time()
    split = split_by_costs([1.0 + (layer % 7) / 10 for layer in range(1000)], 0.1, 5.0, 64)
    assert sum(map(len, split)) == 1000
    assert time.process_time() - start < 10, "dynamic programming over a thousand layers takes about a second"


@pytest.mark.parametrize(
    ("costs", "embedding", "head", "stages", "words"),
    [
        ([1.0, -1.0], 0.0, 0.0, 1, "cost of layer 1 is -1.0"),
        ([1.0], float("nan"), 0.0, 1, "cost of the embedding is nan"),
        ([1.0], 0.0, float("inf"), 1, "cost of the head is inf"),
        ([], 0.0, 1.0, 1, "0 layers cannot be split over 1 stages"),
        ([1.0], 0.0, 0.0, 0, "1 layers cannot be split over 0 stages"),
        ([1.0], 0.0, 1.0, 3, "of which 1 may do without layers"),
    ],
)
def test_costs_that_cannot_be_split_are_refused(costs, embedding, head, stages, words):
    with pytest.raises(ConfigError, match=words):
        split_by_costs(costs, embedding, head, stages)
