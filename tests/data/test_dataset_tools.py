"""The tools that merge, inspect and train: by their command lines."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron3d.data.indexed import IndexedDataset
from tests.data.corpora import write_documents


@pytest.fixture(scope="module")
def merge() -> ModuleType:
    return importlib.import_module("tools.merge_datasets")


@pytest.fixture(scope="module")
def inspect() -> ModuleType:
    return importlib.import_module("tools.inspect_dataset")


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return importlib.import_module("tools.train_tokenizer")


def test_merged_documents_follow_each_other(tmp_path: Path, merge: ModuleType) -> None:
    write_documents(tmp_path / "in" / "b", [[1, 2], []])
    write_documents(tmp_path / "in" / "a", [[3]] * 5000)
    assert merge.main(["--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "by_name")]) == 0
    order = [str(tmp_path / "in" / name) for name in "ba"]
    assert merge.main(["--inputs", *order, "--output-prefix", str(tmp_path / "given")]) == 0
    by_name, given = IndexedDataset(tmp_path / "by_name"), IndexedDataset(tmp_path / "given")
    assert [by_name.document(k).tolist() for k in (0, 4999, 5000, 5001)] == [[3], [3], [1, 2], []]
    assert [given.document(k).tolist() for k in (0, 1, 2, 5001)] == [[1, 2], [], [3], [3]]


def test_an_input_that_is_named_twice_is_merged_once_and_reported(
    tmp_path: Path, merge: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "a", [[1, 2], [3]])
    write_documents(tmp_path / "b", [[4]])
    for ending in (".bin", ".idx"):
        (tmp_path / f"link{ending}").symlink_to(tmp_path / f"a{ending}")
        (tmp_path / f"hard{ending}").hardlink_to(tmp_path / f"a{ending}")
    monkeypatch.chdir(tmp_path)
    assert merge.main(["--inputs", "a", "b", "a", str(tmp_path / "a"), "link", "hard", "--output-prefix", "c"]) == 0
    merged = IndexedDataset(tmp_path / "c")
    assert [merged.document(k).tolist() for k in range(merged.num_documents)] == [[1, 2], [3], [4]]
    said = capsys.readouterr().out
    assert "a is named already; it is merged once, at its first place." in said
    assert "link is named already (as a); it is merged once" in said and said.count("is named already") == 4
    assert "2 inputs, 3 documents" in said


@pytest.mark.heavy
def test_merged_bytes_are_those_of_megatron_core(tmp_path: Path, merge: ModuleType) -> None:
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs megatron-core")
    inputs = [tmp_path / "a", tmp_path / "b"]
    for number, prefix in enumerate(inputs):
        write_documents(prefix, [[number, 7], [8], []])
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for prefix in inputs:
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert merge.main(["--inputs", *map(str, inputs), "--output-prefix", str(tmp_path / "ours")]) == 0
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


def test_merging_what_does_not_fit_is_refused(
    tmp_path: Path, merge: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    write_documents(tmp_path / "a", [[1]], np.uint16)
    write_documents(tmp_path / "b", [[1]], np.int32)
    assert merge.main(["--inputs", a, b, "--output-prefix", str(tmp_path / "c")]) == 3
    assert f"{b} holds int32 but {a} uint16" in capsys.readouterr().err
    assert merge.main(["--inputs", a, a, "--output-prefix", a]) == 2
    assert f"--output-prefix {a} is one of the inputs" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert merge.main(["--input", str(tmp_path / "empty"), "--output-prefix", str(tmp_path / "c")]) == 3
    assert "has no .bin or .idx file" in capsys.readouterr().err


def test_inspection_counts_and_decodes(tmp_path: Path, inspect: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents(tmp_path / "d", [[72, 105], [], [33] * 5, [1, 2, 3]])
    words = [str(tmp_path / "d"), "--tokenizer-type", "ByteTokenizer"]
    assert inspect.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == found["sequences"] == 4 and found["tokens"] == 10
    assert (found["dtype"], found["smallest_id"], found["largest_id"]) == ("uint16", 1, 105)
    rows = {(row["from"], row["to"]): row["documents"] for row in found["document_lengths"]}
    assert rows == {(0, 0): 1, (1, 1): 0, (2, 3): 2, (4, 7): 1}
    assert (found["first_tokens"], found["text"]) == ([72, 105], "Hi")
    assert inspect.main([*words, "--document", "2", "--num-tokens", "3"]) == 0
    assert capsys.readouterr().out.endswith("document 2 begins: 33 33 33\n!!!\n")


def test_inspection_refuses_what_does_not_fit(
    tmp_path: Path, inspect: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    write_documents(tmp_path / "d", [[5, 300]])
    assert inspect.main([str(tmp_path / "d"), "--tokenizer-type", "ByteTokenizer"]) == 3
    assert "has ids from 5 to 300, but ByteTokenizer has 257" in capsys.readouterr().err
    assert inspect.main([str(tmp_path / "d"), "--document", "1"]) == 3
    assert "--document 1 does not exist" in capsys.readouterr().err
    assert inspect.main([str(tmp_path / "none")]) == 3


def test_inspection_of_an_empty_file_says_so(
    tmp_path: Path, inspect: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    write_documents(tmp_path / "d", [])
    assert inspect.main([str(tmp_path / "d")]) == 0
    assert "0 documents, 0 sequences, 0 tokens" in capsys.readouterr().out


def test_tokenizer_is_trained_and_said_to_be_smaller(
    tmp_path: Path, train: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.txt").write_text("abab abab")
    words = ["--input", str(tmp_path / "c.txt"), "--output-dir", str(tmp_path / "t")]
    assert train.main([*words, "--vocab-size", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "fewer than the 1,000 asked for" in printed and f"wrote {tmp_path}/t/tokenizer.json" in printed
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    assert train.main([*words, "--vocab-size", "10"]) == 2
    (tmp_path / "c.txt").write_text("")
    assert train.main([*words, "--vocab-size", "1000"]) == 3
    assert "has no text under the key 'text'" in capsys.readouterr().err
