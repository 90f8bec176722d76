"""The programs that ask a service: the table of sentences with known labels, and the measurement."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from examples import ask_classifier
from tests.serve.started import ROOT, Started
from tools.bench import serving

for package in ("onnxruntime", "starlette", "uvicorn", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[onnx,serve]'")

SENTENCES = ROOT / "examples" / "tricky_sentences.jsonl"


def run(module: object, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Run a program in this process."""
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, words)])
    module.main()


def test_the_tricky_sentences_are_six_kinds_with_one_of_each_label() -> None:
    found = Counter((sentence["kind"], sentence["label"]) for sentence in ask_classifier.read(SENTENCES))
    kinds = {kind for kind, _ in found}
    assert len(kinds) == 6
    assert found == {(kind, label): 1 for kind in kinds for label in ("positive", "negative")}


def test_the_table_has_each_answer_and_counts_the_right_ones(
    service: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    texts = ["good", "Great plot.", "a long , dull film ."]
    labels = [ask_classifier.ask(service.url, {"text": text})["label"] for text in texts]
    expected = [labels[0], labels[1], {"positive": "negative", "negative": "positive"}[labels[2]]]
    lines = [json.dumps({"kind": "k", "text": text, "label": label}) for text, label in zip(texts, expected)]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines) + "\n")
    run(ask_classifier, monkeypatch, tmp_path / "asked.jsonl", "--url", service.url)
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "2 of 3 right"
    for row, text, label, mark in zip(out[2:5], texts, labels, ["", "", "wrong"], strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:3] == ["k", text, label] and 0.5 <= float(cells[3]) <= 1 and cells[5] == mark


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "has no lines"),
        ("{", "line 1 is not a JSON object"),
        ("7", "line 1 is not a JSON object"),
        ('{"kind": "k", "text": "t"}', "line 1 has no label"),
    ],
)
def test_files_that_are_no_sentences_are_refused_by_name_and_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "asked.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        ask_classifier.read(path)


def test_a_refusal_and_a_silent_address_end_with_a_sentence(service: Started) -> None:
    with pytest.raises(SystemExit, match=r"was refused \(422\): .*judges single texts"):
        ask_classifier.ask(service.url, {"text": "good", "pair": "bad"})
    with pytest.raises(SystemExit, match=r"does not answer .* start tools/serve_classifier\.py first"):
        ask_classifier.ask("http://127.0.0.2:9", {"text": "good"})


def test_the_measurement_counts_what_the_service_counts(
    service: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood film\t1\nbad plot\t0\n")
    before = serving.counts(service.url)
    words = ["--url", service.url, "--file", tmp_path / "dev.tsv", "--clients", 2, "--texts", 3, "--seconds", 0.3]
    run(serving, monkeypatch, *words)
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].strip("|").split("|")]
    answered = serving.counts(service.url)["answered"] - before["answered"]
    assert cells[:2] == ["2", "3"] and answered >= 2
    assert float(cells[3]) >= float(cells[2]) and 0 < float(cells[4]) <= float(cells[5])
    assert 3 <= float(cells[6]) <= 6 and float(cells[7]) > 0
