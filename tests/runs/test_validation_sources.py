"""The validation loss of each corpus beside that of the blend: its value, its reports, and that layouts agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.pool import Pool
from tests.runs.harness import TINY, on_rank, random_documents, records, run, run_ok, words, write_tokens

EVALUATE = f"{TINY} --train-iters 2 --eval-iters 2 --eval-interval 1"


def evaluations(path: Path) -> list[dict[str, float]]:
    return [record for record in records(path) if "valid_loss" in record]


def test_each_source_has_the_loss_that_it_has_as_the_only_validation_data(pool: Pool, tmp_path: Path) -> None:
    a, b = (write_tokens(tmp_path / name, random_documents(seed)) for seed, name in enumerate("ab"))
    data = words(EVALUATE, "--train-data-path", a, "--multiple-validation-sets --valid-data-path 0.9", a, "0.1", b)
    both, parallel, alone = (tmp_path / name for name in ("both", "parallel", "alone"))
    ended = run([*data, "--metrics-file", str(both)])
    assert ended.code == 0, ended.err
    run_ok(EVALUATE, "--train-data-path", a, "--valid-data-path", a, "--metrics-file", alone)
    found = evaluations(both)
    assert [one["step"] for one in found] == [1, 2]
    assert [one["valid_loss/a"] for one in found] == [one["valid_loss"] for one in evaluations(alone)]
    assert all(len({one["valid_loss"], one["valid_loss/a"], one["valid_loss/b"]}) == 3 for one in found)
    last = found[-1]
    assert any(
        line.startswith(f"validation on b after step 2 | loss {last['valid_loss/b']:.6f} |") for line in ended.log
    )
    line = f"validation losses after step 2: a {last['valid_loss/a']:.4f}, b {last['valid_loss/b']:.4f}"
    assert line in ended.log[-2:]
    options = "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 1 --metrics-file"
    for one in pool.run(2, on_rank, [*data, *words(options, parallel)]):
        assert one.code == 0, one.err
    for mine, theirs in zip(found, evaluations(parallel), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
