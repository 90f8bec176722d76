"""Whole runs whose samples are cut over ranks: they evaluate as one process does, and their checkpoints go on at other
layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.pool import Pool
from tests.runs.harness import MOCK, on_rank, records, run_ok, words

BASE = f"{MOCK} --hidden-dropout 0.1 --eval-interval 2 --eval-iters 2 --lr-decay-iters 6"
OTHER_LAYOUT = 1e-5  # sums in another order: fp32 rounding, amplified by a few optimizer steps


def _reported(metrics: Path) -> dict[tuple[str, int], float]:
    """Training and validation losses by kind and step."""
    names = ("loss", "valid_loss")
    return {(name, one["step"]): one[name] for one in records(metrics) for name in names if name in one}


def _on_two_ranks(pool: Pool, *options: str | Path) -> None:
    for ended in pool.run(2, on_rank, words(BASE, "--zero-stage 1", *options)):
        assert ended.code == 0, ended.err


def test_a_run_on_cut_samples_goes_on_with_whole_ones_as_if_nothing_had_been_cut(pool: Pool, tmp_path: Path) -> None:
    saved, files = tmp_path / "saved", [tmp_path / name for name in ("whole", "cut", "dp1", "dp2")]
    run_ok(BASE, "--metrics-file", files[0])
    _on_two_ranks(pool, "--context-parallel-size 2 --train-iters 4 --metrics-file", files[1], "--save", saved)
    run_ok(BASE, "--load", saved, "--metrics-file", files[2])
    _on_two_ranks(pool, "--load", saved, "--metrics-file", files[3])
    whole, cut, dp1, dp2 = map(_reported, files)
    assert len(whole) == 9, "six steps and three evaluations"
    assert cut.keys() == {key for key in whole if key[1] <= 4} and dp1.keys() == dp2.keys() == whole.keys() - cut.keys()
    for found in (cut, dp1, dp2):
        assert found == pytest.approx({key: whole[key] for key in found}, rel=OTHER_LAYOUT)
