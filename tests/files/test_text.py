"""Lines end at line feeds alone, byte order marks are taken off once, other encodings are refused by name."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.files.text import TextError, decode, read_lines, split_lines

# All that str.splitlines cuts at, and spaces; "\r" alone is a character of a line too.
_CUTTERS = "\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"


@given(st.text(st.sampled_from("ab \n" + _CUTTERS + "\u3000")))
def test_there_are_as_many_lines_as_wc_counts_and_nothing_is_lost(text: str) -> None:
    lines = split_lines(text)
    assert len(lines) == text.count("\n") + bool(text and not text.endswith("\n"))
    assert "\n".join(lines) == text.replace("\r\n", "\n").removesuffix("\n").removesuffix("\r" * text.endswith("\r"))


def test_lines_are_those_of_wc(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("".join(f"before{one}after\n" for one in _CUTTERS).encode())
    counted = subprocess.run(["wc", "-l", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert len(read_lines(path)) == int(counted) == len(_CUTTERS)
    assert read_lines(path) == [f"before{one}after" for one in _CUTTERS]


def test_carriage_returns_before_line_feeds_belong_to_the_line_end() -> None:
    assert split_lines("a\r\nb\r\n\r\nc\rd") == ["a", "b", "", "c\rd"]


def test_a_byte_order_mark_is_taken_off_once_and_at_the_start_alone() -> None:
    assert decode("\ufeffa\n\ufeffb".encode()) == "a\n\ufeffb"
    assert decode("\ufeff\ufeffa".encode()) == "\ufeffa"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_another_encoding_is_refused_by_name(encoding: str) -> None:
    name = encoding.upper()[:6]
    data = "\ufeffa\n".encode(encoding) if encoding.endswith("be") else "a\n".encode(encoding)
    with pytest.raises(TextError, match=f"it is {name} by its byte order mark; convert it: iconv -f {name} -t UTF-8"):
        decode(data)


@pytest.mark.parametrize(("mark", "place"), [(b"", 3), (b"\xef\xbb\xbf", 6)])
def test_bytes_that_are_no_utf_8_are_named(mark: bytes, place: int) -> None:
    with pytest.raises(TextError, match=f"it is not UTF-8: byte {place} is 0xe9"):
        decode(mark + b"caf\xe9\n")
