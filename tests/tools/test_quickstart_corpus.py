"""The embedded corpus: real text, the same every time, without what does not read like Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron3d.errors import ConfigError, DataError
from tools import quickstart_corpus

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/quickstart_corpus.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    path = tmp_path_factory.mktemp("corpus") / "new folder" / "corpus.jsonl"
    quickstart_corpus.main(["--output", str(path), "--max-mb", "8"])
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_corpus_holds_the_library_as_it_is_on_disk(corpus: list[dict[str, str]]) -> None:
    by_source = {document["source"]: document["text"] for document in corpus}
    assert len(by_source) == len(corpus) > 300
    assert by_source["Lib/json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")


def test_corpus_holds_the_language_reference(corpus: list[dict[str, str]]) -> None:
    topics = [document for document in corpus if document["source"].startswith("topic/")]
    assert len(topics) > 30
    assert any("lambda" in document["text"] for document in topics)


def test_corpus_has_no_tests_other_peoples_packages_or_generated_tables(corpus: list[dict[str, str]]) -> None:
    unwanted = {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "ensurepip", "tkinter"}
    assert not [d["source"] for d in corpus if unwanted & set(d["source"].split("/"))]


def test_corpus_fills_its_limit_and_stays_under_it(corpus: list[dict[str, str]]) -> None:
    size = sum(len(document["text"].encode()) for document in corpus)
    assert 7e6 < size <= 8e6


def test_both_kinds_of_document_are_spread_evenly_so_that_any_part_is_a_fair_sample(
    corpus: list[dict[str, str]],
) -> None:
    is_topic = [document["source"].startswith("topic/") for document in corpus]
    half = len(is_topic) // 2
    assert 0.6 < sum(is_topic[:half]) / sum(is_topic[half:]) < 1.7


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        subprocess.run(
            [sys.executable, TOOL, "--output", tmp_path / name, "--max-mb", "0.5"],
            check=True,
            env={"PYTHONPATH": str(ROOT)},
        )
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_limit_that_leaves_nothing_is_refused_with_its_value() -> None:
    with pytest.raises(ConfigError, match="--max-mb 0 leaves no text"):
        quickstart_corpus.main(["--output", "unused", "--max-mb", "0"])


def test_a_limit_under_the_smallest_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fits into 100 bytes"):
        quickstart_corpus.main(["--output", str(tmp_path / "c.jsonl"), "--max-mb", "0.0001"])


def test_a_file_in_another_encoding_is_read_by_its_coding_line(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\n# caf\u00e9\n".encode("latin-1"))
    assert [d.text for d in quickstart_corpus.library_documents(tmp_path)] == ["# coding: latin-1\n# caf\u00e9\n"]


def test_command_line_ends_with_the_exit_code_of_the_error(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, TOOL, "--output", tmp_path / "c.jsonl", "--max-mb", "-1"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 2 and "--max-mb -1" in ran.stderr
