"""Fine-tuning keeps no weights that are of no use, and says what it is asked for and will not do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron3d.checkpoint.directory import list_checkpoints, step_of
from megatron3d.tasks.glue import finetune
from megatron3d.train.setup import TrainingSetup
from tests.dist.pool import Pool
from tests.runs.harness import Ended, on_rank, run, words
from tests.tasks.small import SCRIPT, USUAL, bert, tool, write_hf, write_task

LAST = 12  # the steps of three epochs
QUERY = "layers.0.attention.qkv.weight"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A fine-tuning on SST-2 that measures only at the end of its three epochs, each of four steps."""
    folder = tmp_path_factory.mktemp("glue")
    hf, sst = write_hf(folder / "hf", bert()), write_task("sst-2", folder / "SST-2")
    return words("--task sst-2 --data-dir", sst, "--hf", hf, USUAL)


def run_with(rank: int, world_size: int, argv: list[str], step: int, at_rank: int, value: float) -> Ended:
    """Body of a rank: the tool, with one weight changed on one rank after a step."""

    def changed(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step_and_change(parts: TrainingSetup, *args: Any, **kwargs: Any) -> Any:
            found = train_step(parts, *args, **kwargs)
            if kwargs["step"] + 1 == step and rank == at_rank:
                parts.engine.weight_views()[QUERY].data[0] = value
            return found

        return step_and_change

    with mock.patch.object(finetune, "train_step", changed(finetune.train_step)):
        return on_rank(rank, world_size, argv, SCRIPT)


def test_weights_that_give_no_finite_loss_are_not_kept_and_the_best_before_stands(
    command: list[str], tmp_path: Path
) -> None:
    ended = run_with(0, 1, [*command, "--save", str(tmp_path)], LAST, 0, float("nan"))
    assert ended.code == 5
    ended.says("the loss on the dev files after epoch 3 is nan", "lower --lr")
    assert [step_of(path) < LAST for path in list_checkpoints(tmp_path)] == [True]


def test_replicas_that_differ_are_not_saved(command: list[str], tmp_path: Path, pool: Pool) -> None:
    argv = [*command, "--micro-batch-size", "4", "--save", str(tmp_path)]
    for ended in pool.run(2, run_with, argv, 4, 1, 0.25):
        assert ended.code == 5
        ended.says(f"after step 4: weights/{QUERY}: rank 1 against rank 0")
    assert list_checkpoints(tmp_path) == []


def test_measurements_between_epochs_that_do_not_come_are_said(command: list[str]) -> None:
    ended = run([*command, "--epochs", "1", "--eval-interval", "4"], script=SCRIPT)
    assert ended.code == 0, ended.err
    ended.says("--eval-interval 4 adds nothing: there are 4 steps, measured after each epoch")


def test_predictions_for_a_file_that_is_not_there_are_said(tmp_path: Path) -> None:
    hf, mnli = write_hf(tmp_path / "hf", bert()), write_task("mnli", tmp_path / "glue" / "MNLI")
    (tmp_path / "glue" / "diagnostic" / "diagnostic.tsv").unlink()
    ended = tool("--task mnli --data-dir", mnli, "--hf", hf, USUAL, "--epochs 1 --predict", tmp_path / "out")
    assert ended.code == 0, ended.err
    ended.says("--predict writes nothing for AX", "diagnostic.tsv is not there")
