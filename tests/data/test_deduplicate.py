"""Duplicates of a corpus: against Jaccard similarities of all pairs, and records that stay as they were."""

from __future__ import annotations

import gzip
import importlib
import json
import random
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron3d.data.prepare.corpus import iterate_texts
from megatron3d.data.prepare.deduplicate import DeduplicateRequest, deduplicate
from megatron3d.data.prepare.duplicates import DuplicateFinder, NearRule, ngrams
from megatron3d.errors import ConfigError
from tests.data.corpora import SHARED, needs_shared


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return importlib.import_module("tools.deduplicate")


def write_lines(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def similarity(a: str, b: str, rule: NearRule) -> float:
    """Jaccard's, with n-grams cut here."""
    first, second = (set(zip(*(words[i:] for i in range(rule.ngram)))) for words in (a.split(), b.split()))
    return len(first & second) / len(first | second)


def test_exact_duplicates_leave_the_first_record_as_it_was(
    tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_lines(
        tmp_path / "a.jsonl",
        [
            b'{"id":1,  "text": "caf\\u00e9 au\\tlait"}',
            b"no json",
            b'{"text": "other", "meta": {"b": [1.50, null]}}',
            '{"text": " cafe\u0301 au lait\\n", "id": 2}'.encode(),  # the accent is a character of its own
            b'{"text": "Other"}',
        ],
    )
    b = tmp_path / "b.jsonl.gz"
    b.write_bytes(gzip.compress(b'{"text": "new"}\r\n{"text": ""}\n{"text": "other "}\n{"text": " "}\n'))
    output = tmp_path / "out" / "clean.jsonl"
    words = ["--input", str(a), str(b), "--output", str(output), "--max-bad-fraction", "0.2"]
    assert tool.main(words) == 0
    lines = a.read_bytes().splitlines()
    assert output.read_bytes().splitlines() == [lines[0], lines[2], lines[4], b'{"text": "new"}', b'{"text": ""}']
    assert [(r["file"], r["line"], r["kept_file"], r["kept_line"], r["kind"], r["similarity"]) for r in rows_of(
        tmp_path / "out" / "clean_duplicates.jsonl"
    )] == [
        (str(a), 4, str(a), 1, "exact", 1.0),
        (str(b), 3, str(a), 3, "exact", 1.0),
        (str(b), 4, str(b), 2, "exact", 1.0),
    ]  # fmt: skip
    assert [row["line"] for row in rows_of(tmp_path / "out" / "clean_rejects.jsonl")] == [2]
    printed = capsys.readouterr().out
    assert "5 of 8 records" in printed and "dropped 3 exact and 0 near" in printed and "1 of 9 records rej" in printed
    assert tool.main([*words, "--no-exact", "--min-chars", "4", "--max-chars", "10"]) == 0
    assert [row["text"] for row in rows_of(output)] == ["other", "Other", "other "]


def test_compressed_output_holds_the_same_lines(tmp_path: Path) -> None:
    texts = ["one", "two", "one", "three"]
    corpus = write_lines(tmp_path / "c.jsonl", [json.dumps({"text": text}).encode() for text in texts])
    for ending in ("jsonl", "jsonl.gz", "jsonl.zst"):
        deduplicate([corpus], tmp_path / f"out.{ending}", DeduplicateRequest())
        assert list(iterate_texts([tmp_path / f"out.{ending}"], "text")) == ["one", "two", "three"]


def test_rows_keep_the_columns_that_are_named(tmp_path: Path, tool: ModuleType) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    table = arrow.table({"body": ["x", "y", "x"], "id": [1, 2, 3], "other": [0, 0, 0]})
    importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / "t.parquet")
    output = tmp_path / "o.jsonl"
    words = ["--input", str(tmp_path / "t.parquet"), "--output", str(output), "--json-key", "body"]
    assert tool.main([*words, "--keep-columns", "id"]) == 0
    assert rows_of(output) == [{"body": "x", "id": 1}, {"body": "y", "id": 2}]


def test_nothing_appears_where_a_run_ends_early(
    tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", [b'{"text": "a"}', b"{", b'{"text": "a"}'])
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "o.jsonl"
    output.write_text("an earlier run's")
    assert tool.main(["--input", str(corpus), "--output", str(output)]) == 3
    assert "1 of 3 records rejected" in capsys.readouterr().err

    def interrupt(counts: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deduplicate([write_lines(corpus, [b'{"text": "a"}'])], output, DeduplicateRequest(), report=interrupt)
    assert tool.main(["--input", str(corpus), "--output", str(tmp_path / "out" / f"{'x' * 300}.jsonl")]) == 7
    assert "File name too long" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["o.jsonl"]
    assert output.read_text() == "an earlier run's"


def test_what_the_options_show_to_be_impossible_is_refused(
    tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", [b'{"text": "a"}'])
    listed = write_lines(tmp_path / "d_duplicates.jsonl", [b'{"text": "a"}'])
    words = ["--input", str(corpus), "--output"]
    out = str(tmp_path / "o.jsonl")
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    for options, message in (
        (
            [out, "--near", "1.5", "--ngram", "0"],
            "--near 1.5 is not a similarity over 0 and up to 1, such as 0.8.\n--ngr",
        ),
        ([out, "--near", "nan"], "--near nan is not a similarity"),
        ([out, "--max-chars", "1", "--min-chars", "2"], "--min-chars 2 and --max-chars 1 leave no length"),
        ([str(tmp_path / "o.txt")], "o.txt has an ending that is not known"),
        ([str(corpus)], "c.jsonl would replace the input"),
        ([str(tmp_path / "d.jsonl"), "--input", str(listed)], f"d.jsonl would replace the input {listed}"),
        ([out, "--near", "0.8"], "--near needs the package rensa; run: "),
    ):
        assert tool.main([*words, *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("num_perm", [64, 128, 250])
def test_bands_are_the_fewest_that_find_a_pair_of_the_threshold(threshold: float, num_perm: int) -> None:
    def miss(bands: int) -> float:
        return (1 - threshold ** (num_perm // bands)) ** bands

    found = NearRule(threshold, num_perm).num_bands
    assert num_perm % found == 0 and miss(found) <= 0.01
    assert all(miss(bands) > 0.01 for bands in range(1, found) if num_perm % bands == 0)


def test_ngrams_are_those_of_words_or_characters() -> None:
    assert ngrams("The  quick, brown FOX", NearRule(ngram=2)) == {"the quick", "quick brown", "brown fox"}
    assert ngrams("short", NearRule(ngram=5)) == {"short"} and ngrams(" -- ", NearRule()) == set()
    assert ngrams("日本語", NearRule(ngram=2, unit="characters")) == {"日本", "本語"}


def check_against_all_pairs(texts: list[str], rule: NearRule) -> tuple[int, int]:
    """Drop near duplicates of `texts` and compare with the similarities of all pairs; how many were kept and dropped.

    Estimates may be wrong by 4.5 standard errors, which one in 100,000 is.
    """
    slack = 4.5 * (rule.threshold * (1 - rule.threshold) / rule.num_perm) ** 0.5
    finder, kept, dropped = DuplicateFinder(exact=False, near=rule), [], 0
    for text in texts:
        found = finder.add(text)
        if found is None:
            kept.append(text)
            continue
        dropped += 1
        true = similarity(text, kept[found.of], rule)
        assert true >= rule.threshold - slack
        assert abs(found.similarity - true) <= 4.5 * max(true * (1 - true) / rule.num_perm, 1e-9) ** 0.5 + 1e-9
    assert all(similarity(a, b, rule) < rule.threshold + slack for a, b in combinations(kept, 2))
    return len(kept), dropped


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_those_of_all_pairs(threshold: float) -> None:
    pytest.importorskip("rensa", reason="needs the package rensa")
    draw = random.Random(7)
    words = [f"w{number}" for number in range(3000)]
    texts = []
    for _ in range(40):
        original = draw.choices(words, k=200)
        texts.append(original)
        for changes in (0, 1, 3, 8, 20):
            copy = list(original)
            for place in draw.sample(range(200), changes):
                copy[place] = draw.choice(words)
            texts.append(copy)
    draw.shuffle(texts)
    kept, dropped = check_against_all_pairs([" ".join(text) for text in texts], NearRule(threshold, ngram=3))
    assert kept >= 40 and dropped >= 80


@needs_shared
def test_planted_copies_of_real_chapters_are_found() -> None:
    pytest.importorskip("rensa", reason="needs the package rensa")
    with gzip.open(SHARED / "books" / "train.jsonl.gz") as stream:
        chapters = [json.loads(line)["text"] for _, line in zip(range(40), stream)]
    draw = random.Random(3)
    copies = []
    for chapter in chapters[::4]:
        words = chapter.split()
        for place in draw.sample(range(len(words)), len(words) // 100):  # one word of a hundred: about 0.9
            words[place] = "misread"
        copies.append(" ".join(words).upper())
    finder = DuplicateFinder(exact=True, near=NearRule(0.8))
    assert [finder.add(text) for text in chapters] == [None] * len(chapters)
    found = [finder.add(text) for text in copies]
    assert [one.of if one else None for one in found] == list(range(0, 40, 4))
    assert all(one is not None and not one.is_exact and 0.8 <= one.similarity < 1 for one in found)


def test_a_later_copy_of_a_dropped_text_is_one_of_the_text_that_stays() -> None:
    pytest.importorskip("rensa", reason="needs the package rensa")
    finder = DuplicateFinder(exact=True, near=NearRule(0.5, ngram=1))
    first, near, other = "a b c d e f g h", "a b c d e f g h i", "entirely other words than those before"
    assert finder.add(first) is None
    assert (found := finder.add(near)) is not None and found.of == 0 and not found.is_exact
    assert finder.add(other) is None
    assert (found := finder.add(near)) is not None and found.of == 0 and found.is_exact
    assert (found := finder.add(other)) is not None and found.of == 1


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"needs the package rensa; run: .*\[dedup\]"):
        DuplicateFinder(exact=True, near=NearRule())
