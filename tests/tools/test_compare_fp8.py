"""The comparison of fp8 with bf16: its runs can start, and differ in nothing but the precision of their layers."""

from __future__ import annotations

from dataclasses import replace

from tools.bench.compare_fp8 import BF16, OTHERS, config_of, table_of


def test_runs_in_fp8_are_those_in_bf16_but_for_their_recipes() -> None:
    plain, *others = (config_of(one, "--mock-data --train-iters 200") for one in (BF16, *OTHERS))
    recipes = [(run.train.fp8_format, run.train.fp8_recipe) for run in (plain, *others)]
    assert len(set(recipes)) == len(recipes) - 1 and recipes[0] == recipes[1] == (None, "tensorwise")
    for run in others:
        assert replace(run, train=replace(run.train, fp8_format=None, fp8_recipe="tensorwise")) == plain
    assert [one.rate for one in OTHERS] == [1.002, 1.0, 1.0, 1.0]


def test_the_table_compares_the_last_losses_with_those_of_bf16() -> None:
    table = table_of({BF16.name: [9.0] * 5 + [2.0] * 20, "--fp8-format e4m3": [9.0] * 5 + [2.01] * 20}, 25)
    assert table.rows == [("bf16", "2.0000", ""), ("`--fp8-format e4m3`", "2.0100", "+0.50 %")]
