"""Bad records through the command line: counted by reason, listed, and too many of them an error."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.prepare.inputs import find_inputs
from megatron3d.data.tokenizer import build_tokenizer
from megatron3d.errors import DataError
from tools import preprocess_data, train_tokenizer

Run = Callable[..., tuple[int, str]]

# A line, its reason, and the beginning of what is said about it.
BAD = [
    (b'{"text": "a"', "not JSON", "this is no JSON (Expecting ',' delimiter at character 12"),
    (b'{"text": "\0"}', "not JSON", "this is no JSON (Invalid control character at character 10"),
    (b'["a"]', "not an object", "this is a JSON list"),
    (b'{"body": "a"}', "key missing", "there is no key 'text', only body;"),
    (b'{"text": null}', "not text", "'text' is None, not a text"),
    (b'{"text": ["a", 1]}', "not text", "'text' is ['a', 1], not a text"),
    (b'{"text": "\xff"}', "not UTF-8", "this is no text (it is not UTF-8: byte 10 is 0xff"),
    (b'{"text": "\\ud83d"}', "lone surrogate", "character 0 is '\\ud83d', half of a surrogate pair"),
    (b'{"text": "a", "more": ' + b"[" * 100_000, "nested too deep", "this is no record (it is nested too deep)"),
    (b'{"more": ' + b"[" * 300 + b"]" * 300 + b"}", "nested too deep", "this is no record (it is nested deeper than"),
    (b'{"text": "a", "more": 1' + b"0" * 1_000_000 + b"}", "number too long", "it has a whole number of more than 4,"),
    (b'{"text": "' + b"a" * 2_000_000 + b'"}', "line too long", "this line takes 2,000,013 bytes with its end"),
]
GOOD = [
    (b'{"text": "a", "text": "b"}', "b"),  # the last of two values counts, as for every reader of JSON
    (b'{"text": "\\u0000\\ud83d\\ude42"}', "\0\U0001f642"),
    (b'{"text": "c", "more": ' + b"[" * 150 + b"]" * 150 + b"}\r", "c"),
    (b'{"text": "d", "more": 0.' + b"1" * 1_000_000 + b"}", "d"),
    (b"\xef\xbb\xbf" + b'{"text": "e"}', "e"),
    (b'{"text": ""}', ""),
]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the tool with the byte tokenizer and `out` as the prefix; its exit code and what it printed."""

    def call(*words: object) -> tuple[int, str]:
        fixed = ["--output-prefix", tmp_path / "out", "--tokenizer-type", "ByteTokenizer"]
        code = preprocess_data.main([str(word) for word in (*words, *fixed)])
        printed = capsys.readouterr()
        return code, printed.err if code else printed.out + printed.err

    return call


def write_lines(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def documents_of(prefix: Path) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), build_tokenizer("ByteTokenizer")
    return [tokenizer.decode(dataset.document(number).tolist()) for number in range(dataset.num_documents)]


def rejects_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out_rejects.jsonl").read_bytes().splitlines()]


def test_bad_records_are_listed_with_reason_and_good_ones_kept_for_any_workers(tmp_path: Path, run: Run) -> None:
    lines = [line for pair in zip(BAD, GOOD * 2) for line in (pair[0][0], pair[1][0])]
    path = write_lines(tmp_path / "c.jsonl", lines)
    found = {}
    for workers in (1, 2):
        limits = ("--max-bad-fraction", 0.5, "--max-line-bytes", 1_500_000)
        code, printed = run("--input", path, *limits, "--workers", workers)
        assert code == 0, printed
        assert "12 of 24 records rejected (2 not JSON, 2 not text, 2 nested too deep, 1 not an object," in printed
        assert f"they are listed in {tmp_path / 'out_rejects.jsonl'}" in printed
        assert "12 documents (2 texts without a token)" in printed
        found[workers] = [(tmp_path / f"out_{name}").read_bytes() for name in ("rejects.jsonl", "text_document.bin")]
    assert found[1] == found[2]
    assert documents_of(tmp_path / "out_text_document") == [text for _, text in GOOD] * 2
    for number, (reject, (line, reason, detail)) in enumerate(zip(rejects_of(tmp_path), BAD, strict=True)):
        assert (reject["file"], reject["line"], reject["reason"]) == (str(path), 2 * number + 1, reason)
        assert reject["detail"].startswith(detail)
        assert reject["record"] == line[:200].decode("utf-8", "backslashreplace")


def test_a_record_bad_in_one_key_is_dropped_from_all(tmp_path: Path, run: Run) -> None:
    lines = [b'{"a": "1", "b": {"c": "x"}}', b'{"a": "2", "b": {}}', b'{"a": "3", "b": "c"}', b'{"a": 4, "b.c": "y"}']
    lines += [b'{"a": "5", "b.c": "literal", "b": {"c": "inner"}}']
    path = write_lines(tmp_path / "c.jsonl", lines)
    code, printed = run("--input", path, "--json-keys", "a", "b.c", "--max-bad-fraction", 1)
    assert code == 0, printed
    assert documents_of(tmp_path / "out_a_document") == ["1", "5"]
    assert documents_of(tmp_path / "out_b.c_document") == ["x", "literal"]
    assert [(one["line"], one["reason"]) for one in rejects_of(tmp_path)] == [
        (2, "key missing"),
        (3, "key missing"),
        (4, "not text"),
    ]


@pytest.mark.parametrize("key", ["", "a/b", "../x"])
def test_a_key_that_is_no_part_of_a_file_name_is_refused(tmp_path: Path, run: Run, key: str) -> None:
    code, printed = run("--input", write_lines(tmp_path / "c.jsonl", [b"{}"]), "--json-keys", key)
    assert code == 2 and f"--json-keys {key!r} cannot be a part of the name of a file" in printed


@pytest.mark.parametrize(
    ("num_bad", "num_good", "words", "ends"),
    [
        (1, 99, (), False),
        (1, 98, (), True),
        (1, 2, (), True),
        (1, 2, ("--max-bad-fraction", 0.34), False),
        (1, 999, ("--max-bad-fraction", 0), True),
        (1, 999, ("--strict",), True),
        (0, 1, ("--strict", "--max-bad-fraction", 0), False),
    ],
)
def test_the_run_ends_beyond_the_fraction_and_writes_nothing(
    tmp_path: Path, run: Run, num_bad: int, num_good: int, words: tuple[object, ...], ends: bool
) -> None:
    path = write_lines(tmp_path / "c.jsonl", [*[b'{"text": "a"}'] * num_good, *[b"{"] * num_bad])
    code, printed = run("--input", path, *words)
    assert code == (3 if ends else 0)
    if ends:
        assert f"c.jsonl, line {num_good + 1}: this is no JSON" in printed
        assert ("--max-bad-fraction" in printed) == ("--strict" not in words)
        assert [one.name for one in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_mistyped_key_ends_the_run_after_a_thousand_records_and_bad_ones_in_a_row_do_not(
    tmp_path: Path, run: Run
) -> None:
    path = write_lines(tmp_path / "c.jsonl", [b'{"text": "a"}'] * 5_000)
    code, printed = run("--input", path, "--json-keys", "txet")
    assert code == 3 and printed.startswith("1,000 of 1,000 records rejected (1,000 key missing), more than")
    assert f"The first: {path}, line 1: there is no key 'txet', only text; name one with --json-keys." in printed
    write_lines(path, [b'{"text": "a"}'] * 600 + [b"{"] * 500 + [b'{"text": "a"}'] * 4_000)
    assert run("--input", path, "--max-bad-fraction", 0.1)[0] == 0


def test_a_list_of_an_earlier_run_does_not_stay_beside_new_output(tmp_path: Path, run: Run) -> None:
    path = write_lines(tmp_path / "c.jsonl", [b'{"text": "a"}', b"{"])
    assert run("--input", path, "--max-bad-fraction", 1)[0] == 0 and len(rejects_of(tmp_path)) == 1
    assert run("--input", write_lines(path, [b'{"text": "a"}']))[0] == 0
    assert not (tmp_path / "out_rejects.jsonl").exists()


def test_wrong_limits_are_refused_together(tmp_path: Path, run: Run) -> None:
    path = write_lines(tmp_path / "c.jsonl", [b'{"text": "a"}'])
    code, printed = run("--input", path, "--max-bad-fraction", "nan", "--max-line-bytes", 0)
    assert code == 2 and "--max-bad-fraction nan is not a fraction" in printed and "--max-line-bytes 0" in printed


def test_a_tokenizer_is_trained_by_the_same_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "c.jsonl", [b'{"text": "some words"}'] * 3 + [b"{"])
    words = ["--input", str(path), "--vocab-size", "300", "--output-dir", str(tmp_path / "tok")]
    assert train_tokenizer.main(words) == 3 and "more than --max-bad-fraction 0.01" in capsys.readouterr().err
    for kind in ("bpe", "word-pieces"):
        assert train_tokenizer.main([*words, "--kind", kind, "--max-bad-fraction", "0.5"]) == 0
        printed = capsys.readouterr().err
        assert printed.count(f"1 of 4 records rejected (1 not JSON); the first: {path}, line 4: this is no JSON") == 1


def test_the_rejects_of_an_earlier_run_are_no_input(tmp_path: Path, run: Run) -> None:
    write_lines(tmp_path / "c.jsonl", [b'{"text": "a"}', b"{"])
    words = ("--input", tmp_path / "*.jsonl", "--max-bad-fraction", 0.5)
    assert run(*words)[0] == 0 and run(*words)[0] == 2
    assert f"--input names {tmp_path / 'out_rejects.jsonl'}, which lists the bad records" in run(*words)[1]


def test_standard_input_is_lines_of_json(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.BytesIO(b'{"text": "from a pipe"}\n\n{"text": "no line end"}')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped))
    path = write_lines(tmp_path / "c.jsonl", [b'{"text": "from a file"}'])
    code, printed = run("--input", path, "-", "--log-interval", 1)
    assert code == 0 and " s left" not in printed and "of the input" not in printed
    assert documents_of(tmp_path / "out_text_document") == ["from a file", "from a pipe", "no line end"]
    assert not piped.closed
    monkeypatch.setattr(sys, "stdin", None)  # as the command `tool <&-` finds it
    assert run("--input", "-") == (3, "--input -: standard input is closed; pipe lines of JSON into the command.\n")


def test_a_pipe_with_a_name_is_told_apart_from_no_file(tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "c.jsonl")
    code, printed = run("--input", tmp_path / "c.jsonl")
    assert code == 3 and "is a pipe or device; pipe lines of JSON into the command with --input -." in printed


def save_dataset(folder: Path, parts: dict[str, list[str]]) -> None:
    """A folder as save_to_disk of datasets 5.2 writes it: streams of Arrow, and the list of them."""
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    for name, texts in parts.items():
        table = arrow.table({"text": texts, "meta": [{"lang": text[:2]} for text in texts]})
        with arrow.OSFile(str(folder / name), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in parts], "_fingerprint": "e7", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_dataset_is_read_in_the_order_of_its_list(tmp_path: Path, run: Run) -> None:
    save_dataset(tmp_path / "d/train", {"data-b.arrow": ["eins", "zwei", "über"], "data-a.arrow": ["vier"]})
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    code, printed = run("--input", tmp_path / "d/train", "--json-keys", "text", "meta.lang")
    assert code == 0, printed
    assert documents_of(tmp_path / "out_text_document") == ["eins", "zwei", "über", "vier"]
    assert documents_of(tmp_path / "out_meta.lang_document") == ["ei", "zw", "üb", "vi"]
    code, printed = run("--input", tmp_path / "d")
    assert code == 3 and f"holds the splits train, test; name one: --input {tmp_path}/d/train" in printed
    code, printed = run("--input", tmp_path / "d/train", "--json-keys", "body")
    assert code == 3 and "data-b.arrow has no column body; its columns are text, meta" in printed


def test_what_is_no_saved_dataset_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            find_inputs([str(path)], note=print)
        return str(caught.value)

    (tmp_path / "plain").mkdir()
    assert "is a folder and not one that save_to_disk of datasets wrote: it has no state.json" in refusal(
        tmp_path / "plain"
    )
    save_dataset(tmp_path / "lost", {"a.arrow": ["x"]})
    (tmp_path / "lost/a.arrow").unlink()
    assert f"its files {tmp_path}/lost/a.arrow are missing" in refusal(tmp_path / "lost")
    for content in ("{", "[]", '{"_data_files": 3}', '{"_data_files": [{"filename": 3}]}', '{"_data_files": []}'):
        (tmp_path / "plain/state.json").write_text(content)
        assert "save it again" in refusal(tmp_path / "plain")


def test_an_arrow_stream_cut_between_two_messages_is_damaged(tmp_path: Path, run: Run) -> None:
    save_dataset(tmp_path / "d", {"a.arrow": ["x"] * 100})
    data = (tmp_path / "d/a.arrow").read_bytes()
    (tmp_path / "d/a.arrow").write_bytes(data[:-8])  # what is left is read without an error by pyarrow
    code, printed = run("--input", tmp_path / "d")
    assert code == 3 and "a.arrow is damaged or truncated: the Arrow stream has no end" in printed


def test_texts_of_columns_that_are_not_utf8_are_bad_records_and_bytes_are_texts(tmp_path: Path, run: Run) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), importlib.import_module("pyarrow.parquet")
    data = [b"fine \xc3\xbc", b"\xff\xfe", None, b""]
    for kind, view in (
        (arrow.binary(), arrow.binary()),
        (arrow.binary(), arrow.string()),
        (arrow.large_binary(), arrow.large_string()),
    ):
        table = arrow.table({"text": arrow.array(data, kind).view(view)})
        parquet.write_table(table, tmp_path / "c.parquet")
        code, printed = run("--input", tmp_path / "c.parquet", "--max-bad-fraction", 0.5)
        assert code == 0, printed
        assert documents_of(tmp_path / "out_text_document") == ["fine ü", ""]
        assert [(one["line"], one["reason"]) for one in rejects_of(tmp_path)] == [(2, "not UTF-8"), (3, "not text")]
