"""Reading the official TSV files: their quirks, and what is said of rows that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.errors import ConfigError, DataError
from megatron3d.tasks.glue.read import distinct_labels, read_rows
from megatron3d.tasks.glue.tasks import GLUE_TASKS, CustomColumns, custom_task, find_task

SST, COLA, MRPC, STS = (GLUE_TASKS[name] for name in ("sst-2", "cola", "mrpc", "sts-b"))


def write(path: Path, *lines: str, end: str = "\n", mark: bool = False) -> Path:
    text = end.join(lines) + end
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
    return path


def test_a_quote_is_a_character_like_any_other(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.tsv", "sentence\tlabel", 'a " lone quote\t1', '" both ends "\t0')
    rows = read_rows(path, SST, labelled=True)
    assert rows.texts == (('a " lone quote', '" both ends "'),)
    assert rows.labels == (1, 0)


def test_cola_has_no_header_in_train_and_dev_and_one_in_test(tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.tsv", "gj04\t1\t\tThey left.", "gj04\t0\t*\tThem left.")
    assert read_rows(dev, COLA, labelled=True).texts == (("They left.", "Them left."),)
    assert read_rows(dev, COLA, labelled=True).labels == (1, 0)
    test = write(tmp_path / "test.tsv", "index\tsentence", "0\tThey left.")
    assert read_rows(test, COLA, labelled=False).texts == (("They left.",),)


def test_byte_order_mark_and_carriage_returns_are_no_text(tmp_path: Path) -> None:
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    path = write(tmp_path / "train.tsv", header, "1\t7\t8\tone text\tthe other", end="\r\n", mark=True)
    rows = read_rows(path, MRPC, labelled=True)
    assert rows.texts == (("one text",), ("the other",))


@pytest.mark.parametrize("character", ["\u2028", "\x0b", "\x0c", "\x1c", "\x85", "\u2029"])
def test_only_a_line_feed_ends_a_row(tmp_path: Path, character: str) -> None:
    path = write(tmp_path / "dev.tsv", "sentence\tlabel", f"before{character}after\t1")
    assert read_rows(path, SST, labelled=True).texts == ((f"before{character}after",),)


def test_a_last_line_without_its_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("gj04\t1\t\tThey left.\ngj04\t0\t*\tThem left.")
    assert len(read_rows(path, COLA, labelled=True)) == 2


@given(st.lists(st.tuples(st.text("ab\"' \\,;|é", min_size=1).filter(str.strip), st.integers(0, 1)), min_size=1))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[str, int]]) -> None:
    lines = [f"{text}\t{label}" for text, label in samples]
    path = write(tmp_path_factory.mktemp("tsv") / "dev.tsv", "sentence\tlabel", *lines)
    rows = read_rows(path, SST, labelled=True)
    assert rows.texts[0] == tuple(text.strip() for text, _ in samples)
    assert rows.labels == tuple(label for _, label in samples)


BAD_ROWS = [
    (SST, ["sentence\tlabel", "fine\t1", "no label"], ["line 3", "1 columns", "sentence, label"]),
    (SST, ["sentence\tlabel", "fine\t1", "a\ttab\t1"], ["line 3", "3 columns"]),
    (SST, ["sentence\tlabel", "fine\tpositive"], ["line 2", "'positive'", "'label'", "one of 0, 1"]),
    (SST, ["sentence\tlabel", " \t1"], ["line 2", "'sentence' is empty"]),
    (COLA, ["gj04\t1\t\tThey left.", "gj04\t2\t\tThey left."], ["line 2", "'2'", "one of 0, 1"]),
]


@pytest.mark.parametrize(("task", "lines", "fragments"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, task, lines: list[str], fragments: list[str]) -> None:
    path = write(tmp_path / "train.tsv", *lines)
    with pytest.raises(DataError) as error:
        read_rows(path, task, labelled=True)
    for fragment in [str(path), *fragments, "--skip-bad-rows"]:
        assert fragment in str(error.value), error.value


@pytest.mark.parametrize("score", ["5.1", "-0.5", "nan", "inf", "high", ""])
def test_a_score_is_a_number_from_0_to_5(tmp_path: Path, score: str) -> None:
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    path = write(tmp_path / "train.tsv", header, f"0\tg\tf\ty\to\ts\ts\tone\ttwo\t{score}")
    with pytest.raises(DataError, match=r"line 2: .* from 0 to 5"):
        read_rows(path, STS, labelled=True)


def test_bad_rows_are_left_out_on_request_and_told(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", "sentence\tlabel", "fine\t1", "no label", "also fine\t0")
    rows = read_rows(path, SST, labelled=True, skip_bad_rows=True)
    assert rows.texts == (("fine", "also fine"),) and rows.labels == (1, 0)
    assert len(rows.skipped) == 1 and f"{path} line 3" in rows.skipped[0]


def test_in_a_file_to_be_predicted_an_empty_text_stays_and_a_missing_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "test.tsv", "index\tsentence", "0\t", "1\ttext")
    assert read_rows(path, SST, labelled=False, skip_bad_rows=True).texts == (("", "text"),)
    path = write(tmp_path / "test.tsv", "index\tsentence", "0", "1\ttext")
    with pytest.raises(DataError, match="line 2"):
        read_rows(path, SST, labelled=False, skip_bad_rows=True)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", "sentence\tlabel", *["no label"] * 7)
    with pytest.raises(DataError, match="and 4 more rows"):
        read_rows(path, SST, labelled=True)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"text\tlabel\nfine\t1\n", ["no column 'sentence'", "'text', 'label'"]),
        (b"", ["is empty"]),
        (b"sentence\tlabel\n", ["no rows"]),
        (b"sentence\tlabel\ncaf\xe9\t1\n", ["not UTF-8", "byte 18 is 0xe9"]),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path, content: bytes, fragments: list[str]) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(path, SST, labelled=True)
    assert all(fragment in str(error.value) for fragment in [str(path), *fragments]), error.value


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.tsv cannot be read"):
        read_rows(tmp_path / "nowhere.tsv", SST, labelled=True)


@pytest.mark.parametrize("name", ["SST-2", "sst2", "sst_2", "STS-B", "stsb", "MNLI", "qnli", "CoLA"])
def test_task_names_are_taken_however_they_are_written(name: str) -> None:
    assert find_task(name).name.replace("-", "") == name.lower().replace("-", "").replace("_", "")


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="--task mrcp is not known; did you mean mrpc"):
        find_task("mrcp")


def test_labels_of_ones_own_file_are_sorted_and_numbers_by_value(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "text\tstars", "x\t10", "y\t9", "z\t2")
    assert distinct_labels(path, "stars") == ("2", "9", "10")
    path = write(tmp_path / "b.tsv", "text\tmood", "x\tsad", "y\tglad")
    assert distinct_labels(path, "mood") == ("glad", "sad")
    with pytest.raises(DataError, match="1 different labels"):
        distinct_labels(write(tmp_path / "c.tsv", "text\tmood", "x\tsad"), "mood")


def test_a_metric_that_does_not_fit_the_labels_is_refused() -> None:
    classes = CustomColumns(("text",), "label", ("a", "b"), False, ("pearson",))
    with pytest.raises(ConfigError, match="--metric pearson does not measure classes; use one of: accuracy, f1"):
        custom_task(classes, train="t", dev="d", test=None)
    both = CustomColumns(("text",), "label", ("a", "b"), True, ())
    with pytest.raises(ConfigError, match="--labels a b names classes, but --regression"):
        custom_task(both, train="t", dev="d", test=None)
