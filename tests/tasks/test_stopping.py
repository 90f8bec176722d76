"""A fine-tuning that is asked to stop: it ends as documented, with the best weights that it had."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron3d.checkpoint.directory import list_checkpoints
from megatron3d.tasks.glue import finetune, predict
from tests.runs.harness import exit_status
from tests.tasks.small import QUIET, USUAL, bert, tool, tuned, write_hf, write_task


def _with_a_signal_before(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, with a SIGTERM to this process before call number `call`."""
    calls = []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # a thread reads the signal
        return function(*args, **kwargs)

    return signalled


@pytest.mark.parametrize(
    ("call", "when", "kept"),
    [(1, "after step 2", "no weights are saved"), (5, "after step 6", "the best weights so far are saved at")],
    ids=["before the first measurement", "after it"],
)
def test_a_signal_stops_a_fine_tuning_after_its_step(tmp_path: Path, call: int, when: str, kept: str) -> None:
    """An epoch is 4 steps and ends with a measurement; a signal within a step is seen after the next one."""
    data, hf = write_task("sst-2", tmp_path / "SST-2"), write_hf(tmp_path / "hf", bert())
    options = ("--task sst-2", "--data-dir", data, "--hf", hf, USUAL, "--save", tmp_path / "save")
    with mock.patch.object(finetune, "train_step", _with_a_signal_before(finetune.train_step, call)):
        ended = tool(*options)
    assert ended.code == 75
    ended.says(f"stopped {when} because SIGTERM was received; {kept}", "started again, it begins anew")
    assert (exit_status(tmp_path / "save")["code"], exit_status(tmp_path / "save")["step"]) == (75, call + 1)
    assert [path.name for path in list_checkpoints(tmp_path / "save")] == ([] if call == 1 else ["iter_0000004"])
    assert tuned(*options)["metrics"], "the same command did not work again"


def test_a_signal_stops_a_measurement_between_batches(tmp_path: Path) -> None:
    data, hf = write_task("sst-2", tmp_path / "SST-2"), write_hf(tmp_path / "hf", bert())
    with mock.patch.object(predict, "_outputs", _with_a_signal_before(predict._outputs, 1)):
        ended = tool("--task sst-2", "--data-dir", data, "--hf", hf, USUAL)
    assert ended.code == 75
    ended.says("stopped after step 4 because SIGTERM was received; no weights are saved")


def test_a_stop_of_a_worse_run_does_not_claim_that_its_weights_are_saved(tmp_path: Path) -> None:
    data, hf, save = write_task("sst-2", tmp_path / "SST-2"), write_hf(tmp_path / "hf", bert()), tmp_path / "save"
    options = ("--task sst-2", "--data-dir", data, "--hf", hf, "--save", save)
    tuned(*options, USUAL)
    (kept,) = list_checkpoints(save)
    worse = ("--epochs 3 --lr 0 --max-seq-length 24 --global-batch-size 8", QUIET)
    with mock.patch.object(finetune, "train_step", _with_a_signal_before(finetune.train_step, 5)):
        ended = tool(*options, *worse)
    assert ended.code == 75
    ended.says(f"because SIGTERM was received; no weights are saved, as {kept} of an earlier run is better")
    with mock.patch.object(predict, "_outputs", _with_a_signal_before(predict._outputs, 2)):
        ended = tool(*options, *worse, "--epochs 1 --predict", tmp_path / "predictions")
    assert (ended.code, list_checkpoints(save)) == (75, [kept])
    ended.says("stopped while predicting because SIGTERM was received; no weights are saved")
