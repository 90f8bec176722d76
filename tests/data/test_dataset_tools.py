"""The tools that merge, inspect and train: by their command lines."""

from __future__ import annotations

import importlib
import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.image import imread

from megatron3d.config.sections.data import DataConfig
from megatron3d.data.build import build_gpt_data
from megatron3d.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron3d.data.length_picture import length_bars
from tests.data.corpora import counting_documents, write_documents


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


def test_verification_counts_and_names_the_first_wrong_token(
    tmp_path: Path, inspect: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron3d.data.verify._BLOCK_IDS", 3)  # a document lies in several blocks
    prefix, end = tmp_path / "d", 256
    documents = [[72, 105, end], [], [33] * 5 + [end], [end, 7, end]]
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
        writer.add_document([1, 2, end], [2, 0, 1, 0])  # sentences, of which two are empty
    words = [str(prefix), "--tokenizer-type", "ByteTokenizer", "--verify", "--json"]
    assert inspect.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    facts = found["verified"]
    assert (facts["documents"], facts["empty_documents"], facts["empty_sequences"], facts["tokens"]) == (5, 1, 3, 15)
    assert (facts["eod_ended"], facts["eod_inside"], facts["outside"], facts["problems"]) == (4, 1, 0, [])
    assert (found["smallest_id"], found["largest_id"]) == (1, end)

    write_documents(prefix, [*documents, [5, 300, 9, 301]])
    assert inspect.main(words) == 3
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["verified"]["problems"]) == 2
    assert f"{prefix}.bin, document 4, sequence 4, token 1: token id 300 is outside the vocabulary" in printed.err
    assert "as are 2 of 16 ids" in printed.err
    assert (
        "sequence 4, token 3: the document does not end with the end-of-document token 256, nor do 1 of 4"
        in printed.err
    )
    assert inspect.main([str(prefix), "--verify", "--vocab-size", "302"]) == 0  # the end of documents is not known
    assert inspect.main([str(prefix), "--verify", "--vocab-size", "302", "--eod-token", "301"]) == 3
    write_documents(prefix, [[5, 6], [7]])  # without --append-eod
    assert inspect.main(words) == 0
    write_documents(prefix, [])
    assert inspect.main(words) == 0


def test_negative_ids_are_outside_of_every_vocabulary(
    tmp_path: Path, inspect: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    write_documents(tmp_path / "d", [[1], [2, -3]], np.int32)
    assert inspect.main([str(tmp_path / "d"), "--verify"]) == 3
    assert "document 1, sequence 1, token 1: token id -3 is outside" in capsys.readouterr().err


@pytest.mark.parametrize("of", ["train", "valid"])
def test_a_shown_sample_is_the_one_that_training_reads(
    tmp_path: Path, inspect: ModuleType, capsys: pytest.CaptureFixture[str], of: str
) -> None:
    prefix = str(tmp_path / "d")
    documents = counting_documents([5, 0, 1, 7, 0, 30, 2, 9, 12, 3])
    write_documents(Path(prefix), documents)
    options = DataConfig(data_path=(prefix,), split="6,4", seed=7)
    built = build_gpt_data(options, seq_length=8, vocab_size=100, eod_token=None)
    stream = getattr(built, of)
    words = [prefix, "--seq-length", "8", "--split", "6,4", "--seed", "7", "--sample-of", of, "--json", "--sample"]
    for number in range(2 * stream.num_samples_per_epoch):
        assert inspect.main([*words, str(number)]) == 0
        sample = json.loads(capsys.readouterr().out)["sample"]
        tokens = [token for part in sample["parts"] for token in part["tokens"]]
        assert tokens == stream.sample(number).tolist()
        for part in sample["parts"]:
            document = documents[part["document"]]
            assert part["tokens"] == document[part["first"] : part["first"] + part["count"]] and part["count"] > 0
            assert part["num_tokens"] == len(document)


def test_a_sample_is_shown_with_its_documents(
    tmp_path: Path, inspect: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    write_documents(tmp_path / "d", [list(b"one"), list(b"two")])
    words = [str(tmp_path / "d"), "--sample", "0", "--split", "1"]
    assert inspect.main([*words, "--seq-length", "5", "--tokenizer-type", "ByteTokenizer"]) == 0
    shown = "--- document 0, tokens 0 to 2 of 3\none\n--- document 1, tokens 0 to 2 of 3\ntwo\n"
    assert capsys.readouterr().out.endswith("sample 0 of train, of 1 in an epoch:\n" + shown)
    assert inspect.main([*words, "--num-tokens", "-1"]) == 2
    printed = capsys.readouterr().err
    assert "--sample 0 needs --seq-length" in printed and "--num-tokens -1 is outside its range" in printed
    assert inspect.main([*words, "--seq-length", "6"]) == 3
    assert "hold 6 tokens, but one sample of --seq-length 6 needs 7" in capsys.readouterr().err


def test_the_lengths_are_drawn(tmp_path: Path, inspect: ModuleType) -> None:
    write_documents(tmp_path / "d", [[1] * length for length in (0, 1, 1, 2, 3, 900, 1024)])
    assert inspect.main([str(tmp_path / "d"), "--histogram", str(tmp_path / "made" / "lengths.png")]) == 0
    picture = imread(tmp_path / "made" / "lengths.png")
    bars = np.isclose(picture[:, :, :3], [0x4C / 255, 0x78 / 255, 0xA8 / 255], atol=0.01).all(axis=2)
    assert picture.shape[0] > 500 and bars.sum() > 1000
    write_documents(tmp_path / "e", [])
    assert inspect.main([str(tmp_path / "e"), "--histogram", str(tmp_path / "empty.png")]) == 0


def test_bars_hold_every_document_once() -> None:
    for lengths in ([1], [1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 7, 15, 16, 17, 1 << 20], list(range(1, 300))):
        edges, counts = length_bars(np.asarray(lengths))
        expected = [sum(low <= length < high for length in lengths) for low, high in pairwise(edges)]
        assert counts.tolist() == expected and counts.sum() == len(lengths)
