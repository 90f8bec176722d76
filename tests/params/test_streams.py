"""Named streams: a seed for each name, unrelated to those of its neighbours."""

from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.params.streams import stream_seed

NAMES = st.lists(st.one_of(st.text("abcxyz.", max_size=6), st.integers(0, 50)), max_size=3)


@given(st.integers(0, 2**31), NAMES)
def test_a_seed_is_the_same_each_time_and_one_that_torch_takes(seed: int, names: list[str | int]) -> None:
    value = stream_seed(seed, *names)
    assert value == stream_seed(seed, *names) and 0 <= value < 2**63
    torch.Generator().manual_seed(value)


def test_seeds_of_different_names_all_differ() -> None:
    places = [(seed, f"layers.{layer}.{half}", shard) for seed in range(10) for layer in range(50)
              for half in ("attention", "mlp") for shard in range(5)]  # fmt: skip
    assert len({stream_seed(*place) for place in places}) == len(places)
    assert stream_seed(1, "ab", "c") != stream_seed(1, "a", "bc"), "words are kept apart"
    assert stream_seed(1, 23) != stream_seed(12, 3)


def test_neighbouring_seeds_differ_in_half_of_their_bits() -> None:
    flips = [bin(stream_seed(n, "dropout") ^ stream_seed(n + 1, "dropout")).count("1") for n in range(1000)]
    # 63 fair coins a thousand times: mean 31.5 with a standard error of 0.13.
    assert abs(sum(flips) / len(flips) - 31.5) < 0.6


def test_numbers_of_two_streams_are_uncorrelated() -> None:
    def draw(number: int) -> torch.Tensor:
        return torch.randn(20000, generator=torch.Generator().manual_seed(stream_seed(1, "noise", number)))

    correlations = torch.corrcoef(torch.stack([draw(number) for number in range(8)])) - torch.eye(8)
    assert correlations.abs().max() < 5 / 20000**0.5, "five standard errors"


def test_a_seed_does_not_depend_on_the_process() -> None:
    code = "from megatron3d.params.streams import stream_seed; print(stream_seed(7, 'init', 'a.b', 3))"
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "12345"}
    text = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(text.stdout) == stream_seed(7, "init", "a.b", 3)
