"""Fine-tuning on files of one's own, and a classifier of transformers that is measured as it is."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import read_document
from megatron3d.tasks.glue.read import read_rows
from megatron3d.tasks.glue.tasks import GLUE_TASKS
from tests.tasks.small import (
    QUIET,
    bert,
    bert_classifier,
    transformers,
    tuned,
    write_hf,
    write_task,
)

RUNS = count()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a small BERT."""
    return write_hf(tmp_path_factory.mktemp("hf"), bert())


def write_own(folder: Path, header: str, rows: list[str]) -> Path:
    """A TSV file of somebody's own."""
    path = folder / f"own{next(RUNS)}.tsv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_ones_own_files_are_learned_by_named_columns(tmp_path: Path, hf: Path) -> None:
    moods = ["glad", "sad", "so so"]
    rows = [f"{number}\tthe film is good\t{moods[number % 3]}\tit is dull" for number in range(12)]
    train = write_own(tmp_path, "id\tone\tmood\ttwo", rows)
    dev = write_own(tmp_path, "id\tone\tmood\ttwo", [row for row in rows if "so so" not in row])
    test = write_own(tmp_path, "two\tone", ["dull\tgood", "good\tdull"])
    columns = "--task tsv --text-column one --second-text-column two --label-column mood --metric f1 accuracy"
    options = f"--epochs 1 --lr 1e-3 --max-seq-length 32 {QUIET}"
    files = ("--train-file", train, "--dev-file", dev, "--test-file", test)
    found = tuned(columns, *files, "--hf", hf, options, "--predict", tmp_path, "--save", tmp_path / "save")
    assert set(found["metrics"]) == {"f1", "accuracy"}
    lines = (tmp_path / "predictions.tsv").read_text().splitlines()
    assert len(lines) == 3 and all(line.split("\t")[1] in moods for line in lines[1:])
    assert read_document(find_checkpoint(tmp_path / "save"), "task")["labels"] == moods
    # The dev file alone has two of the three classes: the checkpoint knows them all.
    again = f"--epochs 0 --max-seq-length 32 {QUIET}"
    after = tuned(columns, "--dev-file", dev, "--load", tmp_path / "save", again)
    assert after["metrics"] == found["metrics"]


def test_ones_own_values_are_learned_and_written_with_their_digits(tmp_path: Path, hf: Path) -> None:
    rows = [f"the film is {word}\t{value}" for word, value in (("good", -0.00125), ("bad", 0.0025), ("fine", 0.5e-3))]
    own = write_own(tmp_path, "sentence\tlabel", rows)
    files = ("--train-file", own, "--dev-file", own, "--test-file", own, "--predict", tmp_path)
    found = tuned("--task tsv --regression", *files, "--hf", hf, f"--epochs 1 --lr 1e-3 {QUIET} --max-seq-length 32")
    assert set(found["metrics"]) == {"pearson", "spearman"}
    values = [line.split("\t")[1] for line in (tmp_path / "predictions.tsv").read_text().splitlines()[1:]]
    assert len(values) == 3 and all(len(value.lstrip("-0.").replace(".", "")) >= 5 for value in values), values


def test_a_kept_classifier_of_transformers_gives_its_predictions(tmp_path: Path) -> None:
    data = write_task("rte", tmp_path / "data")
    model = bert_classifier(2).eval()
    folder = write_hf(tmp_path / "hf", model)
    options = f"--epochs 0 --keep-classifier --max-seq-length 24 {QUIET}"
    found = tuned("--task rte", "--data-dir", data, "--hf", folder, options)
    rows = read_rows(data / "dev.tsv", GLUE_TASKS["rte"], labelled=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(*map(list, rows.texts), padding=True, truncation="longest_first", max_length=24)
    with torch.no_grad():
        scores = model(**{name: torch.tensor(values) for name, values in batch.items()}).logits
    labels = torch.tensor(rows.labels)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item(), rel=1e-5)
    assert found["metrics"]["accuracy"] == (scores.argmax(1) == labels).double().mean().item()
