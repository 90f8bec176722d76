"""The split of layers over stages, against what any split must satisfy and against counts worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.errors import ConfigError
from megatron3d.pipeline.split import describe, split_layers


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


def test_describe_names_each_stage_with_its_layers():
    assert describe(split_layers(3, 2)) == "stage 0: layers 0-1 (2), stage 1: layers 2-2 (1)"
    assert describe((range(0), range(0, 4))) == "stage 0: no layers, stage 1: layers 0-3 (4)"
