"""Text to token files through the command line: every format, any number of workers, and bad input by line."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import zstandard

from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.tokenizer import build_tokenizer
from tests.data.corpora import SHARED, needs_shared

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["first text", "", "zweiter: über", "日本 🙂", "x\ny"] + [f"text number {n} " * (n % 7) for n in range(300)]
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return importlib.import_module("tools.preprocess_data")


@pytest.fixture
def run(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the tool with the byte tokenizer by default; its exit code and what it printed."""

    def call(*words: object) -> tuple[int, str]:
        kind = () if "--tokenizer-type" in words else ("--tokenizer-type", "ByteTokenizer")
        code = tool.main([str(word) for word in (*words, *kind)])
        printed = capsys.readouterr()
        return code, printed.err if code else printed.out + printed.err

    return call


def as_json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def documents_of(prefix: Path) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), build_tokenizer("ByteTokenizer")
    return [tokenizer.decode(dataset.document(number).tolist()) for number in range(dataset.num_documents)]


def write_corpus(path: Path) -> None:
    content = as_json_lines(TEXTS)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        half = len(content) // 2
        content = b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))
    if path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), importlib.import_module("pyarrow.parquet")
        parquet.write_table(arrow.table({"other": list(range(len(TEXTS))), "text": TEXTS}), path, row_group_size=77)
        return
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.jsonl.gz", "c.jsonl.zst", "c.json.gz", "c.parquet"])
def test_every_format_gives_the_documents_in_order(tmp_path: Path, run: Run, name: str) -> None:
    write_corpus(tmp_path / name)
    code, printed = run("--input", tmp_path / name, "--output-prefix", tmp_path / "out")
    assert code == 0, printed
    assert documents_of(tmp_path / "out_text_document") == TEXTS
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [name, "out.resume.json", "out_text_document.bin", "out_text_document.idx"]
    )


def test_text_file_is_one_document(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("drei ü".encode()))
    assert run("--input", tmp_path / "*.txt*", "--output-prefix", tmp_path / "out")[0] == 0
    assert documents_of(tmp_path / "out_text_document") == ["one\n\ntwo\n", "drei ü"]


def test_output_is_the_same_for_any_number_of_workers(tmp_path: Path, run: Run) -> None:
    for part in range(3):
        (tmp_path / f"{part}.jsonl").write_bytes(as_json_lines([f"{part} {n} " * 150 for n in range(1500)]))
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        assert (
            run("--input", tmp_path / "*.jsonl", "--output-prefix", out, "--workers", workers, "--append-eod")[0] == 0
        )
    for ending in ("bin", "idx"):
        one, three = (tmp_path / f"out{workers}_text_document.{ending}" for workers in (1, 3))
        assert one.read_bytes() == three.read_bytes()
    dataset = IndexedDataset(tmp_path / "out3_text_document")
    assert len(dataset) == 4500
    assert all(bytes(dataset[n].tolist()[:-1]).decode().startswith(f"{n // 1500} {n % 1500} ") for n in range(4500))


def test_end_of_document_is_appended_to_documents_that_are_not_empty(tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(["a", "", "bc"]))
    code, printed = run("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out", "--append-eod")
    assert code == 0 and "3 documents (1 texts without a token), 5 tokens" in printed
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert [dataset.document(k).tolist() for k in range(3)] == [[97, 256], [], [98, 99, 256]]
    assert dataset.document_bounds.tolist() == [0, 1, 1, 2] and dataset.dtype == "uint16"


def test_lists_of_sentences_become_sequences(tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": ["ab", "", "c"]}\n{"text": "d"}\n')
    assert run("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out", "--append-eod")[0] == 0
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert [dataset[i].tolist() for i in range(3)] == [[97, 98], [99, 256], [100, 256]]
    assert dataset.document_bounds.tolist() == [0, 2, 3]


def test_split_sentences_writes_what_megatron_core_writes(tmp_path: Path, run: Run) -> None:
    """The same sentences through Megatron's own builder give the same two files, byte for byte, for any workers."""
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs megatron-core")
    texts = ["One is here. Two is there!", "", "Mr. Three alone", "Vier.\n\nFünf? Sechs."]
    cut = [["One is here.", "Two is there!"], [], ["Mr. Three alone"], ["Vier.", "Fünf?", "Sechs."]]
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(texts))
    for workers in (1, 2):
        words = ("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out", "--split-sentences")
        code, printed = run(*words, "--append-eod", "--workers", workers)
        assert code == 0 and "wrote " + str(tmp_path / "out_text_sentence.bin") in printed
        assert "4 documents (1 texts without a token), 6 sentences" in printed
        builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=theirs.DType.optimal_dtype(257))
        for sentences in cut:
            ids = [list(sentence.encode()) for sentence in sentences]
            ids[-1:] = [[*last, 256] for last in ids[-1:]]
            builder.add_document([token for sentence in ids for token in sentence], [len(sentence) for sentence in ids])
        builder.finalize(str(tmp_path / "theirs.idx"))
        for ending in ("bin", "idx"):
            ours = (tmp_path / f"out_text_sentence.{ending}").read_bytes()
            assert ours == (tmp_path / f"theirs.{ending}").read_bytes()
    read = theirs.IndexedDataset(str(tmp_path / "out_text_sentence"))
    assert [bytes(read[n].tolist()).decode() for n in (0, 3)] == ["One is here.", "Vier."]
    assert read.document_indices.tolist() == [0, 2, 2, 3, 6]


def test_sentences_follow_the_language_the_lists_and_the_line_ends(tmp_path: Path, run: Run) -> None:
    lines = [{"text": "Am 3. Mai. Dann.\n\nEnde"}, {"text": ["Already cut. So it stays.", "Second"]}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out", "--split-sentences")
    found = {}
    for name, more in (("de", ("--lang", "german", "--keep-newlines")), ("en", ())):
        assert run(*words, *more)[0] == 0
        dataset = IndexedDataset(tmp_path / "out_text_sentence")
        found[name] = [bytes(dataset[n].tolist()).decode() for n in range(len(dataset))]
    lists = ["Already cut. So it stays.", "Second"]
    assert found["de"] == ["Am 3. Mai.", "Dann.\n\n", "Ende", *lists]
    assert found["en"] == ["Am 3.", "Mai.", "Dann.", "Ende", *lists]


def test_each_key_has_its_own_files(tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.jsonl").write_text('{"title": "t", "text": "ab", "n": 1}\n\n{"text": "c", "title": "u"}\n')
    out = tmp_path / "out"
    assert run("--input", tmp_path / "c.jsonl", "--output-prefix", out, "--json-keys", "title", "text")[0] == 0
    assert documents_of(tmp_path / "out_title_document") == ["t", "u"]
    assert documents_of(tmp_path / "out_text_document") == ["ab", "c"]


def test_ids_over_uint16_are_stored_as_int32(tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(["70000 1"]))
    words = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 70001)
    assert run("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out", *words)[0] == 0
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert dataset.dtype == "int32" and dataset[0].tolist() == [70000, 1]


def test_progress_says_rate_and_time_left(tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(["x" * 2000] * 1000))
    _, printed = run("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out", "--log-interval", 100)
    assert printed.count(" docs/s, ") >= 3 and " MB/s, " in printed and " s left" in printed


def test_partitions_are_explained(tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(["x"]))
    code, printed = run("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out", "--partitions", 4)
    assert code == 0 and "--partitions 4: nothing is partitioned, the input is streamed" in printed


def test_a_file_named_twice_is_read_once_and_a_line_says_so(tmp_path: Path, run: Run) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(as_json_lines([name]))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "a.jsonl")
    named = (tmp_path / "b.jsonl", tmp_path / "*.jsonl", tmp_path / "b.jsonl", f"{tmp_path}/./a.jsonl")
    code, printed = run("--input", *named, "--output-prefix", tmp_path / "out")
    assert code == 0 and documents_of(tmp_path / "out_text_document") == ["b", "a"]
    notes = [line.removeprefix(f"--input {tmp_path}/") for line in printed.splitlines() if line.startswith("--input")]
    assert notes == [
        f"*.jsonl: {tmp_path}/b.jsonl is named already; it is read once, at its first place.",
        f"*.jsonl: {tmp_path}/hard.jsonl is named already (as {tmp_path}/a.jsonl); "
        "it is read once, at its first place.",
        f"*.jsonl: {tmp_path}/link.jsonl is named already (as {tmp_path}/a.jsonl); "
        "it is read once, at its first place.",
        f"b.jsonl: {tmp_path}/b.jsonl is named already; it is read once, at its first place.",
        f"./a.jsonl: {tmp_path}/a.jsonl is named already; it is read once, at its first place.",
    ]


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.txt"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, run: Run, name: str) -> None:
    content = b"\xef\xbb\xbf" + (b"a\xc2\x85b" if name.endswith(".txt") else as_json_lines(["a\x85b"]))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    code, printed = run("--input", tmp_path / name, "--output-prefix", tmp_path / "out")
    assert code == 0, printed
    assert documents_of(tmp_path / "out_text_document") == ["a\x85b"]


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.zst", "c.txt"])
def test_a_corpus_in_utf_16_is_refused_by_name(tmp_path: Path, run: Run, name: str) -> None:
    content = "a" if name.endswith(".txt") else as_json_lines(["a"]).decode()
    data = content.encode("utf-16")
    (tmp_path / name).write_bytes(zstandard.compress(data) if name.endswith(".zst") else data)
    code, printed = run("--input", tmp_path / name, "--output-prefix", tmp_path / "out")
    assert code == 3 and f"{tmp_path / name} cannot be read as text: it is UTF-16 by its byte order mark" in printed


BAD_LINES = [
    (b'{"text": ' + b"[" * 100_000 + b"\n", "c.jsonl, line 1: this is no record (it is nested too deep)"),
    (b'{"text": "a"}\n\n{"text": \n', "c.jsonl, line 3: this is no JSON (Expecting value"),
    (b'{"text": "a"}\n["a"]\n', "c.jsonl, line 2: this is a JSON list; each line must hold one JSON object."),
    (b'{"title": "a", "n": 1}\n', "c.jsonl, line 1: there is no key 'text', only title, n; name one with --json-keys."),
    (b'{"text": 5}\n', "c.jsonl, line 1: 'text' is 5, not a text or a list of texts."),
    (b'{"text": "a\\ud800"}\n', "c.jsonl, line 1: character 1 is '\\ud800', half of a surrogate pair; remove it."),
    (b'{"text": "\xff"}\n', "c.jsonl, line 1: this is no text (it is not UTF-8: byte 10 is 0xff"),
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("content", "message"), BAD_LINES)
def test_bad_line_is_named_and_nothing_is_written(
    tmp_path: Path, run: Run, content: bytes, message: str, workers: int
) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    words = ("--output-prefix", tmp_path / "out", "--workers", workers, "--strict")
    code, printed = run("--input", tmp_path / "c.jsonl", *words)
    assert code == 3 and printed.startswith(f"{tmp_path}/{message}")
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_bad_line_late_in_the_file_has_its_number_with_workers(tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(["x" * 200] * 5000) + b"{\n" + as_json_lines(["y"] * 3000))
    words = ("--output-prefix", tmp_path / "out", "--workers", 2, "--strict")
    code, printed = run("--input", tmp_path / "c.jsonl", *words)
    assert code == 3 and "c.jsonl, line 5001: this is no JSON" in printed


def test_null_tokenizer_error_names_the_line(tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(["1 2", "3 x"]))
    words = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 10)
    code, printed = run("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out", *words)
    assert code == 3 and "c.jsonl, line 2: the NullTokenizer reads ids from 0 to 10, not 'x'" in printed


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_empty_corpus_is_refused(tmp_path: Path, run: Run, content: bytes) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    code, printed = run("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out")
    assert code == 3 and f"The corpus {tmp_path}/c.jsonl is empty" in printed and "nothing was written" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize(("name", "cut"), [("c.jsonl.gz", -10), ("c.jsonl.zst", 20), ("c.parquet", -10)])
def test_truncated_file_is_named(tmp_path: Path, run: Run, name: str, cut: int) -> None:
    write_corpus(tmp_path / name)
    content = (tmp_path / name).read_bytes()[:cut]
    (tmp_path / name).write_bytes(content)
    code, printed = run("--input", tmp_path / name, "--output-prefix", tmp_path / "out")
    assert code == 3 and str(tmp_path / name) in printed


def test_wrong_usage_has_exit_code_2(tmp_path: Path, run: Run, tool: ModuleType) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(["x"]))
    (tmp_path / "c.csv").write_text("x")
    out = ("--output-prefix", tmp_path / "out")
    for words, message in [
        ((tmp_path / "c.jsonl", "--split-sentences", "--lang", "klingon"), "--lang klingon is not known"),
        ((tmp_path / "c.jsonl", "--workers", 0), "--workers 0 is not at least 1"),
        ((tmp_path / "c.jsonl", "--tokenizer-type", "GPT2BPETokenizer"), "GPT2BPETokenizer needs --vocab-file"),
        ((tmp_path / "c.csv",), "c.csv has an ending that is not known"),
    ]:
        code, printed = run("--input", *words, *out)
        assert code == 2 and message in printed
    with pytest.raises(SystemExit) as caught:
        tool.main(["--output-prefix", "x"])
    assert caught.value.code == 2


def test_missing_input_and_missing_column_have_exit_code_3(tmp_path: Path, run: Run) -> None:
    out = ("--output-prefix", tmp_path / "out")
    code, printed = run("--input", tmp_path / "no*.jsonl", *out)
    assert code == 3 and f"--input {tmp_path}/no*.jsonl names no file" in printed
    (tmp_path / "links" / "folder.jsonl").mkdir(parents=True)
    write_corpus(tmp_path / "links" / "a.jsonl")
    assert run("--input", tmp_path / "links" / "*.jsonl", *out)[0] == 0
    (tmp_path / "links" / "b.jsonl").symlink_to(tmp_path / "gone")
    code, printed = run("--input", tmp_path / "links" / "*.jsonl", *out)
    assert code == 3 and f"--input {tmp_path}/links/b.jsonl cannot be read (No such file or directory)" in printed
    write_corpus(tmp_path / "c.parquet")
    code, printed = run("--input", tmp_path / "c.parquet", *out, "--json-keys", "body")
    assert code == 3 and "has no column body; its columns are other, text" in printed


@needs_shared
def test_append_eod_without_such_a_token_is_refused(tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(["x"]))
    vocab = SHARED / "tokenizers/bert-base-uncased/vocab.txt"
    words = ("--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", vocab, "--append-eod")
    code, printed = run("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out", *words)
    assert code == 2 and "BertWordPieceLowerCase has no end-of-document token" in printed


def test_output_that_cannot_be_written_has_exit_code_7(tmp_path: Path, run: Run) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(["x"]))
    code, printed = run("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "c.jsonl" / "out")
    assert code == 7 and "could not write" in printed


def test_disk_that_refuses_the_tokens_has_exit_code_7_and_leaves_nothing(tmp_path: Path, run: Run) -> None:
    """A limit on the size of files stands for a full disk: both refuse in the middle of a write."""
    (tmp_path / "c.jsonl").write_bytes(as_json_lines(["x" * 1000] * 100))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        code, printed = run("--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 7 and ": File too large; raise the limit on file sizes (ulimit -f)" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


@needs_shared
def test_real_corpus_has_the_counted_tokens_and_the_script_runs_by_itself(tmp_path: Path) -> None:
    """Documents and GPT-2 tokens of the held-out novel are those of the data's own table."""
    gpt2 = SHARED / "tokenizers/gpt2"
    words = ["--input", SHARED / "books/valid.jsonl", "--output-prefix", tmp_path / "books", "--workers", "2"]
    words += ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", gpt2 / "vocab.json"]
    words += ["--merge-file", gpt2 / "merges.txt", "--append-eod"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools/preprocess_data.py", *words]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    dataset = IndexedDataset(tmp_path / "books_text_document")
    assert (dataset.num_documents, dataset.num_tokens) == (27, 77_738 + 27)
    tokenizer = build_tokenizer(
        "GPT2BPETokenizer", vocab_file=str(gpt2 / "vocab.json"), merge_file=str(gpt2 / "merges.txt")
    )
    first = json.loads((SHARED / "books/valid.jsonl").read_text(encoding="utf-8").split("\n")[0])["text"]
    assert tokenizer.decode(dataset[0].tolist()) == first + "<|endoftext|>"


@needs_shared
def test_real_corpus_is_cut_into_sentences_of_a_sensible_length(tmp_path: Path, run: Run) -> None:
    vocab = SHARED / "tokenizers/bert-base-uncased/vocab.txt"
    words = ("--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", vocab, "--split-sentences")
    code, printed = run("--input", SHARED / "books/valid.jsonl", "--output-prefix", tmp_path / "b", *words)
    assert code == 0, printed
    dataset = IndexedDataset(tmp_path / "b_text_sentence")
    assert dataset.num_documents == 27 and 2500 < len(dataset) < 4000
    tokenizer = build_tokenizer("BertWordPieceLowerCase", vocab_file=str(vocab))
    ends = Counter(tokenizer.decode([int(dataset[n][-1])]) for n in range(len(dataset)))
    assert sum(ends[mark] for mark in ".!?\"'\u201d\u2019") > 0.97 * len(dataset)
