"""A run says at its start what it will take, and takes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.pool import Pool
from tests.runs.harness import MOCK, on_rank, records, words


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ("--pipeline-model-parallel-size 2 --zero-stage 1 --bf16", 4),
        ("--zero-stage 3 --offload-optimizer cpu --offload-params cpu", 2),
    ],
)
def test_the_start_record_predicts_the_state_that_is_allocated(
    pool: Pool, tmp_path: Path, flags: str, world_size: int
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    options = words(MOCK, f"--train-iters 1 --micro-batch-size 1 {flags} --metrics-file", metrics)
    ended = pool.run(world_size, on_rank, options)
    assert [one.code for one in ended] == [0] * world_size, ended[0].err
    start = records(metrics)[0]
    allocated, predicted = start["bytes_per_rank"], start["predicted_bytes_per_rank"]
    assert allocated == {name: predicted[name] for name in allocated}
    assert predicted["activations"] > 0 and predicted["buffers"] > 0
    on_device = sum(predicted[name] for name in ("weights", "gradients", "optimizer"))
    assert on_device < predicted["peak"] <= on_device + predicted["activations"] + predicted["buffers"]
    assert "predicted for a step on the fullest rank: peak " in ended[0].out
