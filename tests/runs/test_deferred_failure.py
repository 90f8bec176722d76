"""What fails outside the model ends a run only after all ranks have saved; what fails in a step cannot wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron3d.data.loader import GlobalBatches
from megatron3d.errors import DataError
from megatron3d.train.reports import Reports
from tests.dist.pool import Pool
from tests.runs.harness import MOCK, Ended, exit_status, on_rank, records, run_ok, steps, words


def _failing(call: Callable[..., Any], fails: Callable[..., bool], error: Exception) -> Callable[..., Any]:
    def call_or_fail(*args: Any, **kwargs: Any) -> Any:
        if fails(*args, **kwargs):
            raise error
        return call(*args, **kwargs)

    return call_or_fail


def _with_report_that_fails(rank: int, world_size: int, argv: list[str], step: int) -> Ended:
    def is_time(reports: Reports, progress: Any, *_: Any, **__: Any) -> bool:
        return progress.step == step and rank == 0

    broken = _failing(Reports.step, is_time, TypeError("a number was None"))
    with mock.patch.object(Reports, "step", broken):
        return on_rank(rank, world_size, argv)


def _with_evaluation_that_cannot_be_read(rank: int, world_size: int, argv: list[str]) -> Ended:
    first_batches = itertools.count()  # the first is that of training, the second that of the evaluation

    def is_second(reader: GlobalBatches, consumed_samples: int, *_: Any) -> bool:
        return rank == 1 and consumed_samples == 0 and next(first_batches) == 1

    broken = _failing(GlobalBatches.read, is_second, DataError("corpus.bin ends at byte 100"))
    with mock.patch.object(GlobalBatches, "read", broken):
        return on_rank(rank, world_size, argv)


@pytest.mark.parametrize(("step", "saved"), [(3, 4), (6, 6)], ids=["on the way", "at the last step"])
def test_a_report_that_fails_unexpectedly_ends_the_run_after_a_save(
    pool: Pool, tmp_path: Path, step: int, saved: int
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    argv = words(MOCK, "--metrics-file", metrics, "--save", tmp_path / "save")
    first, second = pool.run(2, _with_report_that_fails, argv, step)
    assert (first.code, second.code) == (1, 6)
    first.says("TypeError: a number was None", "Traceback", f"after step {saved}")
    second.says("rank 0 failed: TypeError; saved at", "start again")
    assert (tmp_path / "save" / "latest").read_text() == f"iter_{saved:07d}\n"
    status = exit_status(tmp_path / "save")
    assert (status["code"], status["step"], status["rank"]) == (1, saved, 0)
    run_ok(MOCK, "--metrics-file", metrics, "--save", tmp_path / "save")
    assert [record["step"] for record in steps(metrics)] == [one for one in range(1, 7) if one != step]


def test_an_evaluation_that_one_rank_cannot_read_ends_the_run_after_a_save_and_is_made_by_the_next(
    pool: Pool, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    options = "--eval-iters 2 --eval-interval 4 --train-iters 8"
    argv = words(MOCK, options, "--metrics-file", metrics, "--save", tmp_path / "save")
    first, second = pool.run(2, _with_evaluation_that_cannot_be_read, argv)
    assert (first.code, second.code) == (6, 3)
    second.says("corpus.bin ends at byte 100", "after step 4")
    first.says("rank 1 failed: DataError; saved at")
    assert (tmp_path / "save" / "latest").read_text() == "iter_0000004\n"
    run_ok(MOCK, options, "--metrics-file", metrics, "--save", tmp_path / "save")
    found = [record for record in records(metrics) if "valid_loss" in record]
    assert [record["step"] for record in found] == [4, 8]


def _with_training_data_that_cannot_be_read(
    rank: int, world_size: int, argv: list[str], consumed_samples: int, number: int
) -> Ended:
    """Rank 1 cannot read the batch at these samples when it is asked for it the `number`th time."""
    asked = itertools.count(1)

    def fails(reader: GlobalBatches, at: int, *_: Any) -> bool:
        return rank == 1 and at == consumed_samples and next(asked) == number

    broken = _failing(GlobalBatches.read, fails, DataError("corpus.bin ends at byte 100"))
    with mock.patch.object(GlobalBatches, "read", broken):
        return on_rank(rank, world_size, argv)


def test_a_batch_after_iterations_that_are_left_out_is_read_while_there_is_a_vote(pool: Pool, tmp_path: Path) -> None:
    """Steps 4 and 5 are left out; the batch of step 6 cannot be read, which the vote of step 3 must know."""
    argv = words(MOCK, "--train-iters 8 --iterations-to-skip 3 4 --save", tmp_path / "save")
    first, second = pool.run(2, _with_training_data_that_cannot_be_read, argv, 5 * 8, 1)
    assert (first.code, second.code) == (6, 3)
    second.says("corpus.bin ends at byte 100", "after step 3")
    assert (tmp_path / "save" / "latest").read_text() == "iter_0000003\n"
    run_ok(MOCK, "--train-iters 8 --iterations-to-skip 3 4 --save", tmp_path / "save")


def test_a_proof_of_the_last_weights_that_one_rank_cannot_read_ends_all_with_the_save_named(
    pool: Pool, tmp_path: Path
) -> None:
    argv = words(MOCK, "--train-iters 4 --keep-last 1 --save-interval 2 --save", tmp_path / "save")
    first, second = pool.run(2, _with_training_data_that_cannot_be_read, argv, 3 * 8, 2)
    assert (first.code, second.code) == (6, 3)
    second.says("corpus.bin ends at byte 100")
    first.says("rank 1 failed: DataError; saved at")
    assert (tmp_path / "save" / "latest").read_text() == "iter_0000004\n"
