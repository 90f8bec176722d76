"""A fine-tuning into a --save that an earlier one used: the better classifier stays the latest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import read_document
from tests.tasks.small import QUIET, VOCABULARY, bert, tool, tuned, write_hf, write_task

SHORT = f"--max-seq-length 24 --global-batch-size 8 {QUIET}"
GOOD, BAD = f"--epochs 3 --lr 2e-3 {SHORT}", f"--epochs 2 --lr 0 {SHORT}"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf"), bert())


@pytest.fixture(scope="module")
def sst(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task("sst-2", tmp_path_factory.mktemp("sst"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, hf: Path, sst: Path) -> Path:
    """--save of a fine-tuning that learned something."""
    save = tmp_path_factory.mktemp("learned") / "save"
    found = tuned("--task sst-2", "--data-dir", sst, "--hf", hf, GOOD, "--save", save)
    assert found["metrics"]["accuracy"] >= 0.8, "there must be something to lose"
    return save


@pytest.fixture
def save(learned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(learned, tmp_path / "save"))


def test_a_worse_run_leaves_the_better_classifier_and_says_so(save: Path, hf: Path, sst: Path) -> None:
    kept, document = find_checkpoint(save), read_document(find_checkpoint(save), "task")
    ended = tool("--task sst-2", "--data-dir", sst, "--hf", hf, BAD, "--save", save)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out.splitlines()[-1])["metrics"]["accuracy"] < document["metrics"]["accuracy"]
    ended.says(f"not saved: {kept} of an earlier run is better", "give another --save")
    assert (find_checkpoint(save), read_document(kept, "task")) == (kept, document)


def test_an_equal_run_is_saved_again(save: Path, hf: Path, sst: Path) -> None:
    ended = tool("--task sst-2", "--data-dir", sst, "--hf", hf, GOOD, "--save", save)
    ended.says(f"saved {find_checkpoint(save)}, the best so far")


def test_a_directory_of_something_else_is_refused(save: Path, hf: Path, sst: Path, tmp_path: Path) -> None:
    kept = find_checkpoint(save)
    mrpc = write_task("mrpc", tmp_path / "mrpc")
    ended = tool("--task mrpc", "--data-dir", mrpc, "--hf", hf, GOOD, "--save", save)
    assert ended.code == 4
    ended.says(f"--save {save} is in use: {kept} holds a classifier of sst-2 measured by accuracy", "another --save")
    other = Path(shutil.copytree(hf, tmp_path / "other"))
    (other / "vocab.txt").write_text("\n".join([*VOCABULARY[:-1], "new"]) + "\n")
    ended = tool("--task sst-2", "--data-dir", sst, "--hf", other, GOOD, "--save", save)
    assert ended.code == 4
    ended.says(f"--save {save} holds checkpoints with another tokenizer")
    assert find_checkpoint(save) == kept


def test_a_classifier_measured_on_other_rows_is_not_compared(save: Path, hf: Path, sst: Path, tmp_path: Path) -> None:
    kept = find_checkpoint(save)
    other = write_task("sst-2", tmp_path / "other", dev={0: "the good film\t1"})
    ended = tool("--task sst-2", "--data-dir", other, "--hf", hf, BAD, "--save", save)
    assert ended.code == 4
    ended.says(f"--save {save} is in use: {kept} holds a classifier of sst-2 measured on other dev files", "another")
    assert find_checkpoint(save) == kept
    same = Path(shutil.copytree(sst, tmp_path / "same"))
    shorter = BAD.replace("--max-seq-length 24", "--max-seq-length 16")
    ended = tool("--task sst-2", "--data-dir", same, "--hf", hf, shorter, "--save", save)
    assert ended.code == 0, "a copy of the rows is the same, whatever their samples are cut to"
    ended.says("of an earlier run is better")
