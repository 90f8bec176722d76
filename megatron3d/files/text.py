"""Text that people bring: UTF-8 with or without a byte order mark, in lines that a line feed ends and nothing else.

Python's `str.splitlines` and universal newlines also cut at U+2028, U+0085, form feeds and lone carriage returns, which
texts contain; rows would no longer match the lines that every other program counts. A byte order mark is taken off
once, at the start of a file; text of another encoding is refused by name where its mark gives it away.
"""

from __future__ import annotations

import codecs
from pathlib import Path

# UTF-32 first: its mark in little-endian order begins with that of UTF-16.
_MARKS_OF_OTHERS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_ANY_MARK_OF_OTHERS = tuple(mark for mark, _ in _MARKS_OF_OTHERS)  # asked first: each line of a corpus comes here


class TextError(ValueError):
    """Bytes that are not UTF-8; the message is a clause for behind the name of the file, with the remedy."""


def check_encoding(start: bytes) -> None:
    """Refuse the first bytes of a file that carry the byte order mark of another encoding than UTF-8.

    Raises:
        TextError: they do.
    """
    if not start.startswith(_ANY_MARK_OF_OTHERS):
        return
    for mark, name in _MARKS_OF_OTHERS:
        if start.startswith(mark):
            raise TextError(f"it is {name} by its byte order mark; convert it: iconv -f {name} -t UTF-8")


def decode(data: bytes) -> str:
    """The text of a file's bytes, without a byte order mark.

    Raises:
        TextError: the bytes are not UTF-8.
    """
    check_encoding(data[:4])
    text = data.removeprefix(codecs.BOM_UTF8)
    try:
        return text.decode()  # not by the codec utf-8-sig, which takes longer than reading a short line of JSON
    except UnicodeDecodeError as error:
        place = error.start + len(data) - len(text)
        raise TextError(f"it is not UTF-8: byte {place} is {data[place]:#04x}; convert it") from error


def split_lines(text: str) -> list[str]:
    """The lines of `text` without their ends, which are a line feed alone or behind a carriage return."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: the file cannot be read.
        TextError: it is not UTF-8.
    """
    return decode(path.read_bytes())


def read_lines(path: Path) -> list[str]:
    """The lines of a file; raises as `read_text` does."""
    return split_lines(read_text(path))
