"""The official metrics against their formulas, and the leaderboard's files."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.errors import ConfigError, StorageError
from megatron3d.tasks.glue.metrics import mean_of, measure, over_seeds
from megatron3d.tasks.glue.predict import mean_loss, metrics_of, prediction_lines, write_predictions
from megatron3d.tasks.glue.tasks import GLUE_TASKS

PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=50)


@given(PAIRS)
def test_metrics_of_two_classes_are_those_of_the_formulas(pairs: list[tuple[int, int]]) -> None:
    predictions, labels = (np.array(column) for column in zip(*pairs))
    tp, tn = ((predictions == label) & (labels == label) for label in (1, 0))
    tp, tn = int(tp.sum()), int(tn.sum())
    fp, fn = int((predictions > labels).sum()), int((predictions < labels).sum())
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    found = measure(("accuracy", "f1", "matthews"), predictions, labels, num_classes=2)
    assert found["accuracy"] == pytest.approx((tp + tn) / len(pairs))
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / product**0.5 if product else 0.0)


def test_correlations_are_those_of_the_formulas() -> None:
    values, labels = np.array([1.0, 2.0, 4.0, 3.0, 9.0], np.float32), np.array([0.5, 1.0, 2.5, 3.0, 5.0], np.float32)
    ranks = [np.argsort(np.argsort(x)) for x in (values, labels)]
    found = measure(("pearson", "spearman"), values, labels, num_classes=1)
    assert found["pearson"] == pytest.approx(np.corrcoef(values, labels)[0, 1], rel=1e-5)
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-5)


def test_a_constant_answer_correlates_with_nothing() -> None:
    found = measure(("pearson", "spearman"), np.ones(4), np.arange(4.0), num_classes=1)
    assert found == {"pearson": 0.0, "spearman": 0.0}


def test_f1_of_more_than_two_classes_is_the_mean_over_them() -> None:
    predictions, labels = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])
    assert measure(("f1",), predictions, labels, num_classes=3)["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_scores_over_metrics_and_seeds() -> None:
    assert mean_of({"f1": 0.8, "accuracy": 0.6}) == pytest.approx(0.7)
    means, spread = over_seeds([{"f1": 0.8}, {"f1": 0.6}, {"f1": 0.7}])
    assert means == {"f1": pytest.approx(0.7)} and spread == {"f1": pytest.approx(0.1)}
    assert over_seeds([{"f1": 0.8}])[1] == {"f1": 0.0}


def test_missing_libraries_are_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_scipy(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError("no scipy", name="scipy")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ConfigError, match=r"scipy is not installed; run: .*constraints.txt -e '.*\[glue\]'"):
        measure(("accuracy",), np.ones(2), np.ones(2), num_classes=2)


def test_the_leaderboard_wants_a_header_row_numbers_and_the_datas_own_labels() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.7, 0.2]])
    assert prediction_lines(scores, GLUE_TASKS["rte"]) == ["index\tprediction", "0\tnot_entailment", "1\tentailment"]
    assert prediction_lines(scores, GLUE_TASKS["sst-2"])[1:] == ["0\t1", "1\t0"]
    values = torch.tensor([[5.6], [2.125], [-1.0]])
    assert prediction_lines(values, GLUE_TASKS["sts-b"])[1:] == ["0\t5.000", "1\t2.125", "2\t0.000"]


def test_files_are_named_as_the_leaderboard_names_them() -> None:
    names = [name for task in GLUE_TASKS.values() for name in task.test]
    expected = "CoLA SST-2 MRPC STS-B QQP MNLI-m MNLI-mm AX QNLI RTE WNLI"
    assert names == expected.split()


def test_predictions_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"could not write the predictions \(--predict\) .*SST-2.tsv"):
        write_predictions(tmp_path / "file" / "SST-2.tsv", torch.zeros(1, 2), GLUE_TASKS["sst-2"])


def test_loss_and_metrics_come_from_the_scores_of_all_samples() -> None:
    scores, labels = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), np.array([0, 1])
    first, second = scores[0].softmax(0)[0].log(), torch.tensor(0.5).log()
    assert mean_loss(scores, labels) == pytest.approx(-(first + second).item() / 2)
    assert metrics_of(scores, labels, GLUE_TASKS["sst-2"]) == {"accuracy": 0.5}
    values, targets = torch.tensor([[1.0], [2.0]]), np.array([1.5, 4.0], np.float32)
    assert mean_loss(values, targets) == pytest.approx((0.25 + 4.0) / 2)
