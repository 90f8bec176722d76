"""Options of random-LTD: which layers and how many positions they mean, and a sentence for each mistake."""

from __future__ import annotations

import pytest

from megatron3d.config.check import check, resolve
from megatron3d.config.random_ltd import dropping_layers, positions_kept
from tests.config.test_experts import given

LTD = "--seq-length 64 --random-ltd --random-ltd-min 16 --random-ltd-steps 10"


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ("", (1, 2, 3, 4)),
        ("3 1", (1, 3)),
        ("1:-1", (1, 2, 3, 4)),
        ("0 ::2", (0, 2, 4)),
        ("-2: 0", (0, 4, 5)),
    ],
)
def test_layers_are_numbers_and_slices(words: str, layers: tuple[int, ...]) -> None:
    assert dropping_layers(words.split(), 6) == layers


def test_the_number_of_positions_grows_as_in_deepspeed() -> None:
    """DeepSpeed's fixed_linear: floor(t / T (max - min) + min), less the remainder by the step size; at most max."""
    train = resolve(given(f"{LTD} --random-ltd-max 48"), 1).train

    def of_deepspeed(step: int) -> int:
        wanted = int(step / 10 * (48 - 16) + 16)
        return min(wanted - wanted % 16, 48)

    found = [positions_kept(train, step, 64) for step in range(14)]
    assert found == [of_deepspeed(step) for step in range(14)] and set(found) == {16, 32, 48}


def test_without_a_maximum_it_ends_with_all_positions() -> None:
    train = resolve(given(f"{LTD} --seq-length 72"), 1).train
    assert [positions_kept(train, step, 72) for step in (0, 9, 10, 10**9)] == [16, 64, 72, 72]
    constant = resolve(given("--seq-length 64 --random-ltd --random-ltd-min 32 --random-ltd-max 32"), 1).train
    assert {positions_kept(constant, step, 64) for step in range(5)} == {32}


MISTAKES = [
    ("--random-ltd-min 32", "--random-ltd-min 32 is about --random-ltd; give that too"),
    ("--random-ltd-layers 1 2", "--random-ltd-layers 1 2 is about --random-ltd"),
    ("--random-ltd", "--random-ltd needs --random-ltd-min"),
    (f"{LTD} --random-ltd-min 20", "--random-ltd-min 20 is not a multiple of 16; use 16."),
    (f"{LTD} --random-ltd-step-size 24", "--random-ltd-step-size 24 is not a multiple of 16; use 32."),
    (f"{LTD} --random-ltd-max 40", "--random-ltd-max 40 is neither a multiple of 16 nor --seq-length 64"),
    (f"{LTD} --seq-length 10", "--random-ltd keeps at least 16 positions, and samples have 10; leave it out"),
    (f"{LTD} --random-ltd-max 128", "--random-ltd-max 128 is above --seq-length 64"),
    (f"{LTD} --random-ltd-min 48 --random-ltd-max 32", "--random-ltd-min 48 is above --random-ltd-max 32"),
    ("--random-ltd --seq-length 64 --random-ltd-min 16", "grows to 64 positions in --random-ltd-steps, which is not"),
    (f"{LTD} --random-ltd-layers 4", "--random-ltd-layers 4 has 4, and the last of 4 layers is 3"),
    (f"{LTD} --random-ltd-layers x", "--random-ltd-layers x has x, which is no number of a layer"),
    (f"{LTD} --random-ltd-layers 1:1", "--random-ltd-layers 1:1 has none of the 4 layers"),
    (f"{LTD} --num-layers 2", "all but the first and the last of 2 layers, which leaves none"),
    (f"{LTD} --random-ltd-router a.py:f", "says itself how many positions are kept, and --random-ltd-min 16"),
    (f"{LTD} --random-ltd-router mine", "--random-ltd-router mine names no function"),
    (f"{LTD} --random-ltd-min 0", "--random-ltd-min 0 is outside its range"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_a_mistake_is_named_with_its_fix(words: str, expected: str) -> None:
    assert any(expected in problem for problem in check(given(words), 1)), check(given(words), 1)


def test_shards_of_the_sequence_must_be_whole_strata() -> None:
    words = f"{LTD} --hidden-size 48 --num-attention-heads 6 --seq-length 96 --tensor-model-parallel-size 3"
    (problem,) = check(given(f"{words} --sequence-parallel"), 3)
    assert "--tensor-model-parallel-size 3 shards, which are no whole sixteenths" in problem
    assert check(given(words), 3) == []
