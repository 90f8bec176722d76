"""The comparison of fp8 with bf16: its runs can start, and differ in nothing but the precision of their layers."""

from __future__ import annotations

from dataclasses import replace

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.run import RunConfig
from tools.bench.compare_fp8 import BF16, COMMON, CONTENDERS, IN_FP8
from tools.bench.training_runs import Contender


def run_of(contender: Contender) -> RunConfig:
    words = f"{COMMON} {contender.options} --mock-data --train-iters 200".split()
    return resolve(parse_args(words, program="p", description="d", log=lambda line: None), 1)


def test_runs_in_fp8_are_those_in_bf16_but_for_their_recipes() -> None:
    runs = {contender.name: run_of(contender) for contender in CONTENDERS}
    plain = runs.pop(BF16.name)
    recipes = {(run.train.fp8_format, run.train.fp8_recipe) for run in runs.values()}
    assert len(recipes) == len(IN_FP8) and plain.train.fp8_format is None
    for run in runs.values():
        assert replace(run, train=replace(run.train, fp8_format=None, fp8_recipe="tensorwise")) == plain
