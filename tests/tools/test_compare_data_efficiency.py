"""The comparison of data-efficient training: what its table says, and that its options exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron3d.config.cli import parse_args
from tools.bench.compare_data_efficiency import COMMON, Outcome, contenders, table_of


def test_a_table_says_when_each_seed_reached_the_last_loss_of_usual_training() -> None:
    usual = Outcome("usual", [10, 20], [[5.0, 4.0], [5.0, 3.0]], [100.0, 200.0], [1e9, 2e9])
    other = Outcome("other", [10, 20], [[4.5, 3.5], [4.0, 2.0]], [50.0, 150.0], [1e9, 2e9])
    worse = Outcome("worse", [10, 20], [[4.5, 3.5], [5.0, 3.5]], [50.0, 150.0], [1e9, 2e9])
    names = contenders(20, Path("index"))[:3]
    rows = table_of(names, [usual, other, worse]).rows
    assert rows[0][4:] == ("20, 20", "200", "1.00")
    assert rows[1] == ("other", "150", "1.00", "2.750 (2.000 to 3.500)", "15, 15", "100", "0.75")
    assert rows[2][4:] == ("15, not reached", "not by all", "not by all")
    assert other.steps_to(4.5, 0) == 10 and other.at(other.tokens, 5) == 25


@pytest.mark.parametrize("number", range(5))
def test_every_way_to_train_has_options_that_exist(number: int) -> None:
    way = contenders(500, Path("index"))[number]
    parse_args(f"{COMMON} {way.options} --mock-data --train-iters 500".split(), program="test", description="")
