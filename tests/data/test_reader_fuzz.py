"""Readers of corpora under input that nobody wrote: records, rejects or our own error, and nothing else.

The reference is Python's own: lines cut by `bytes.split`, each parsed by `json.loads`.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from megatron3d.data.prepare import lines as line_blocks
from megatron3d.data.prepare.corpus import read_batches, read_blocks
from megatron3d.data.prepare.lines import as_records
from megatron3d.data.prepare.records import Reason, Reject, Unreadable, parse_documents
from megatron3d.data.prepare.rejects import MAX_LINE_BYTES
from megatron3d.data.prepare.spans import InputSpan, Position
from megatron3d.errors import DataError

BOM = b"\xef\xbb\xbf"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".bz2": bz2.compress,
}
RECORDS = st.dictionaries(
    st.sampled_from(["text", "meta", "id"]),
    st.one_of(st.text(), st.text(), st.lists(st.text(), max_size=3), st.integers(), st.none(), st.floats()),
)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A line of JSON, one with a few bytes changed, or any bytes; it may hold line ends of its own."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=40))
    line = bytearray(json.dumps(draw(RECORDS), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    if draw(st.integers(0, 2)) == 0:
        for _ in range(draw(st.integers(1, 3))):
            line[draw(st.integers(0, len(line) - 1))] = draw(st.integers(0, 255))
    return bytes(line) + draw(st.sampled_from([b"", b"", b" \t ", b"\r", b"\r\r"]))


CONTENTS = st.builds(
    lambda mark, parts, end, last: mark + end.join(parts) + last,
    st.sampled_from([b"", b"", BOM]),
    st.lists(lines(), max_size=8),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.sampled_from([b"", b"\n", b"\r\n", b"\r"]),
)


def expected(content: bytes, max_line_bytes: int) -> tuple[list[tuple[int, list[str]]], list[int]]:
    """Line numbers and texts of the good records of lines of JSON, and the line numbers of the bad ones."""
    good, bad = [], []
    for number, line in enumerate(content.removeprefix(BOM).split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if not line.strip() and len(line) <= max_line_bytes:
            continue
        try:
            assert len(line) + len(BOM) * (number == 1 and content.startswith(BOM)) <= max_line_bytes
            value = json.loads(line.decode("utf-8-sig"))["text"]
            texts = value if isinstance(value, list) else [value]
            good.append((number, [text.encode().decode() for text in texts]))
        except (ValueError, AssertionError, TypeError, KeyError, AttributeError, IndexError):
            bad.append(number)
    return good, bad


def read(
    path: Path, start: Position | None = None, *, max_line_bytes: int = MAX_LINE_BYTES
) -> tuple[list[tuple[int, list[str]]], list[Reject]]:
    """The same from a file, through our readers."""
    good, rejects = [], []
    for batch in read_batches([InputSpan(path)], ["text"], start=start, max_line_bytes=max_line_bytes):
        parsed = parse_documents(batch, ["text"])
        assert len(parsed.documents[0]) + len(parsed.rejects) == len(batch.records) == len(batch.line_numbers)
        for document in parsed.documents[0]:
            good.append((int(document.place.rpartition("line ")[2]), document.sentences))
        rejects += parsed.rejects
    return good, rejects


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check_lines(folder: Path, content: bytes, ending: str, max_line_bytes: int) -> None:
    """Compare our readers with the reference."""
    assume(not content.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")))  # other encodings, refused by name
    path = folder / f"c.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](content))
    good, rejects = read(path, max_line_bytes=max_line_bytes)
    assert (good, [reject.line for reject in rejects]) == expected(content, max_line_bytes)
    for reject in rejects:
        assert json.loads(reject.as_json_line().decode()) == vars(reject)
    if not ending:
        by_range, held = (
            [*read_blocks([InputSpan(path)], ["text"], max_line_bytes=max_line_bytes, by_range=by_range)]
            for by_range in (True, False)
        )
        assert [as_records(block) for block in by_range] == [as_records(block) for block in held]


@settings(deadline=None, max_examples=100)
@given(content=CONTENTS, ending=st.sampled_from([*COMPRESS]), limit=st.sampled_from([MAX_LINE_BYTES, 5, 60]))
def test_lines_of_any_bytes_are_the_records_and_rejects_that_the_reference_finds(
    folder: Path, content: bytes, ending: str, limit: int
) -> None:
    check_lines(folder, content, ending, limit)


@pytest.mark.slow
@settings(deadline=None, max_examples=4_000)
@given(content=CONTENTS, ending=st.sampled_from([*COMPRESS]), limit=st.sampled_from([MAX_LINE_BYTES, 5, 60]))
def test_many_lines_of_any_bytes_are_the_records_and_rejects_that_the_reference_finds(
    folder: Path, content: bytes, ending: str, limit: int
) -> None:
    check_lines(folder, content, ending, limit)


@settings(deadline=None, max_examples=30)
@given(content=CONTENTS, ending=st.sampled_from(["", ".gz", ".xz"]), limit=st.sampled_from([MAX_LINE_BYTES, 5, 60]))
def test_reading_from_the_end_of_any_batch_gives_the_rest(
    folder: Path, content: bytes, ending: str, limit: int
) -> None:
    assume(not content.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")))
    path = folder / f"p.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](content))
    good, rejects = read(path, max_line_bytes=limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_blocks, "_BLOCK_LINES", 2)
        ends = [batch.end for batch in read_batches([InputSpan(path)], ["text"], max_line_bytes=limit)]
    for end in ends:
        rest = read(path, end, max_line_bytes=limit)
        assert rest[0] == [one for one in good if one[0] > end.num_read]
        assert rest[1] == [one for one in rejects if one.line > end.num_read]


def test_long_lines_and_many_short_ones_are_the_same_by_place_and_by_content(folder: Path) -> None:
    """Lines longer than a block and than several, at and over the limit, between so many short ones that blocks are cut
    by their number."""
    path, limit = folder / "long.jsonl", 3 << 20
    short = b'{"text": "a"}\n' * 3000
    sizes = (line_blocks._BLOCK_BYTES - 1, line_blocks._BLOCK_BYTES, limit, limit + 1, limit + 5_000_000)
    path.write_bytes(short + b"".join(b"%s\r\n%s" % (b"x" * size, short) for size in sizes) + b"y" * (limit + 1))
    found = []
    for by_range in (True, False):
        blocks = [*read_blocks([InputSpan(path)], ["text"], max_line_bytes=limit, by_range=by_range)]
        found.append([as_records(block) for block in blocks])
        assert all(len(batch.records) <= line_blocks._BLOCK_LINES for batch in found[-1])
    assert found[0] == found[1]
    records = [(number, one) for batch in found[0] for number, one in zip(batch.line_numbers, batch.records)]
    assert [number for number, _ in records] == [*range(1, 6 * 3000 + 5 + 2)]
    unreadable = [(number, one.detail, one.start) for number, one in records if isinstance(one, Unreadable)]
    assert [number for number, *_ in unreadable] == [4 * 3000 + 4, 5 * 3000 + 5, 6 * 3000 + 6]
    ends = [(limit + 3, b"x"), (limit + 5_000_002, b"x"), (limit + 1, b"y")]
    for (_, detail, start), (size, letter) in zip(unreadable, ends, strict=True):
        assert f"this line takes {size:,} bytes" in detail and start.startswith(letter * 200)


CHANGED = {
    "a line less": b'{"text": "a"}\n' * 8,
    "the last line cut": b'{"text": "a"}\n' * 8 + b'{"text',
    "another file with as many lines": b'{"text": "aaaa"}\n' + b'{"text": "a"}\n' * 9,
}


@pytest.mark.parametrize("content", CHANGED.values(), ids=CHANGED)
def test_a_file_that_changes_between_cut_and_split_is_an_error(folder: Path, content: bytes) -> None:
    path = folder / "changing.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 9)
    (block,) = read_blocks([InputSpan(path)], ["text"], by_range=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} has changed while it was read"):
        as_records(block)
    path.unlink()
    with pytest.raises(DataError, match=f"{path} cannot be read"):
        as_records(block)


@pytest.mark.parametrize("span_end", [None, 14 * 8000], ids=["whole", "a shard"])
@pytest.mark.parametrize("by_range", [False, True])
def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(
    folder: Path, span_end: int | None, by_range: bool
) -> None:
    path, line = folder / "shrinking.jsonl", b'{"text": "a"}\n'
    path.write_bytes(line * 9000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_blocks, "_BLOCK_BYTES", 1 << 14)
        blocks = read_blocks([InputSpan(path, 0, span_end)], ["text"], by_range=by_range)
        next(blocks)
        path.write_bytes(line * 5000)
        with pytest.raises(DataError, match=f"{path} has changed while it was read"):
            list(blocks)


def column_file(kind: str) -> bytes:
    """A small file of columns, with texts, no text, and nested values."""
    arrow = pytest.importorskip("pyarrow")
    texts = [f"text {number} " * (number % 5) for number in range(40)]
    table = arrow.table({"text": [*texts, None], "meta": [{"lang": text[:3]} for text in texts] + [None]})
    sink = arrow.BufferOutputStream()
    if kind == ".parquet":
        importlib.import_module("pyarrow.parquet").write_table(table, sink, row_group_size=16)
    else:
        new = arrow.ipc.new_stream if kind == ".arrow" else arrow.ipc.new_file
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=16)
    return sink.getvalue().to_pybytes()


def compressed_file(ending: str) -> bytes:
    """Lines of JSON, compressed."""
    return COMPRESS[ending](b"".join(b'{"text": "line %d of a text"}\n' % number for number in range(50)))


DAMAGED: dict[str, Callable[[], bytes]] = {
    "c.jsonl.gz": lambda: compressed_file(".gz"),
    "c.jsonl.zst": lambda: compressed_file(".zst"),
    "c.jsonl.xz": lambda: compressed_file(".xz"),
    "c.jsonl.bz2": lambda: compressed_file(".bz2"),
    "c.parquet": lambda: column_file(".parquet"),
    "c.arrow": lambda: column_file(".arrow"),
    "file.arrow": lambda: column_file("file"),
}


def check_damaged(folder: Path, name: str, cut: float, where: float, byte: int) -> None:
    """Cut a file off, or change a byte: what is read are records, rejects or an error of ours that names the file."""
    data = bytearray(DAMAGED[name]())
    if cut < 1:
        del data[int(cut * len(data)) :]
    else:
        data[int(where * len(data))] ^= byte
    (folder / name).write_bytes(data)
    try:
        good, rejects = read(folder / name)
    except DataError as error:
        assert str(folder / name) in str(error)
        return
    assert cut == 1, "a file that was cut off was taken for a whole one"
    assert all(reject.reason in Reason for reject in rejects)
    # Without a checksum damage may be any text; the others have the lines they had.
    assert (len(good), len(rejects)) == (50, 0) or name.endswith((".zst", ".parquet", ".arrow"))


FRACTIONS = st.floats(0, 1, exclude_max=True)


@settings(deadline=None, max_examples=80)
@example("c.arrow", 1.0, 252.5 / 2184, 8)  # a length beyond the memory
@example("c.arrow", 1.0, 72.5 / 2184, 4)  # the name of a column that is no text
@example("c.parquet", 1.0, 798.5 / 1756, 128)
@given(
    name=st.sampled_from([*DAMAGED]), cut=st.one_of(st.just(1.0), FRACTIONS), where=FRACTIONS, byte=st.integers(1, 255)
)
def test_a_damaged_file_is_an_error_of_ours_or_has_records(
    folder: Path, name: str, cut: float, where: float, byte: int
) -> None:
    check_damaged(folder, name, cut, where, byte)


@pytest.mark.slow
@settings(deadline=None, max_examples=4_000)
@given(
    name=st.sampled_from([*DAMAGED]), cut=st.one_of(st.just(1.0), FRACTIONS), where=FRACTIONS, byte=st.integers(1, 255)
)
def test_a_file_damaged_in_many_ways_is_an_error_of_ours_or_has_records(
    folder: Path, name: str, cut: float, where: float, byte: int
) -> None:
    check_damaged(folder, name, cut, where, byte)
