"""From the records of a corpus, as they were read, to texts; and which records are bad, for which reason.

A record is good if all keys that are asked for hold text. A bad one is dropped from all keys, so that they stay in
step, and becomes a `Reject`; nothing here raises for what stands in a file. Whether the run goes on is decided by
`rejects.py`. Of a key that stands twice in an object the last value counts, as for every reader of JSON.
"""

from __future__ import annotations

import codecs
import importlib
import importlib.util
import json
import reprlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from megatron3d.data.prepare.spans import Position
from megatron3d.files import json_text
from megatron3d.files.text import TextError

MAX_DEPTH = 200  # of a record; a limit of its own, since that of Python's recursion depends on who calls
_EXCERPT_BYTES = 200
# Reads JSON twice as fast as Python's own reader, where it is installed; all it accepts has the same strings by both.
_ORJSON: Any = importlib.import_module("orjson") if importlib.util.find_spec("orjson") else None


class Reason(StrEnum):
    """Why a record is bad."""

    NOT_UTF8 = "not UTF-8"
    NOT_JSON = "not JSON"
    TOO_LONG = "line too long"
    TOO_DEEP = "nested too deep"
    LONG_NUMBER = "number too long"
    NOT_AN_OBJECT = "not an object"
    NO_KEY = "key missing"
    NOT_TEXT = "not text"
    LONE_SURROGATE = "lone surrogate"


@dataclass(frozen=True)
class Reject:
    """A bad record: its file, its line there from 1 (or row), why, the same as a sentence, and its first bytes."""

    file: str
    line: int
    reason: Reason
    detail: str
    record: str

    @property
    def message(self) -> str:
        """The sentence with its place."""
        return f"{self.file}, line {self.line}: {self.detail}"

    def as_json_line(self) -> bytes:
        """The reject as a line of the rejects file."""
        return (json.dumps(vars(self), ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Unreadable:
    """A record that the reader could not hand on, such as a line over the limit: why, and its first bytes."""

    reason: Reason
    detail: str
    start: bytes


@dataclass(frozen=True)
class RawBatch:
    """Records in a row of one file, not yet parsed: lines of JSON as bytes, or the values of a row by key.

    `path` is the file, or the name of the span; `line_numbers` counts its lines (or rows, or documents) from 1. `end`
    is where the next batch begins. `input_bytes` is how far the reading of all spans has come, in bytes on the disk.
    """

    path: str
    line_numbers: list[int]
    records: list[bytes | dict[str, Any] | Unreadable]
    input_bytes: int
    end: Position


class Document(NamedTuple):
    """The texts of one key of one record: one, or several where the value is a list of sentences (`is_split`)."""

    place: str
    sentences: list[str]
    is_split: bool


@dataclass(frozen=True)
class ParsedBatch:
    """The documents of a batch, a list for each key and the same records in each of them, and the bad records."""

    documents: tuple[list[Document], ...]
    rejects: tuple[Reject, ...]


class _BadRecordError(Exception):
    """What is wrong with a record; caught where the record is known."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def parse_documents(batch: RawBatch, keys: Sequence[str]) -> ParsedBatch:
    """The documents of `batch` under each of `keys`, in order, and its bad records.

    A key with dots names a value inside objects (`a.b` is that of `b` in the object under `a`), unless the record has
    a key that is spelled so.
    """
    documents: tuple[list[Document], ...] = tuple([] for _ in keys)
    rejects = []
    for number, record in zip(batch.line_numbers, batch.records):
        try:
            values = _parse(record)
            texts = [_texts(values, key) for key in keys]
        except _BadRecordError as error:
            detail = _printable(str(error))
            rejects.append(Reject(batch.path, number, error.reason, detail, _excerpt(record)))
            continue
        place = f"{batch.path}, line {number}"
        for found, (sentences, is_split) in zip(documents, texts):
            found.append(Document(place, sentences, is_split))
    return ParsedBatch(documents, tuple(rejects))


def _parse(record: bytes | dict[str, Any] | Unreadable) -> dict[str, Any]:
    """The values of a record by key."""
    if isinstance(record, dict):
        return record
    if isinstance(record, Unreadable):
        raise _BadRecordError(record.reason, record.detail)
    try:
        values = _values(record)
    except TextError as error:
        raise _BadRecordError(Reason.NOT_UTF8, f"this is no text ({error}).") from error
    except json_text.NestingError as error:
        raise _BadRecordError(Reason.TOO_DEEP, f"this is no record ({error}).") from error
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        detail = f"this is no JSON ({reason} at character {error.pos}); each line must hold one JSON object."
        raise _BadRecordError(Reason.NOT_JSON, detail) from error
    except ValueError as error:  # Python converts whole numbers up to a limit only
        detail = f"it has a whole number of more than {sys.get_int_max_str_digits():,} digits."
        raise _BadRecordError(Reason.LONG_NUMBER, detail) from error
    if not isinstance(values, dict):
        raise _BadRecordError(
            Reason.NOT_AN_OBJECT, f"this is a JSON {type(values).__name__}; each line must hold one JSON object."
        )
    return values


def _values(record: bytes) -> Any:
    """The value of a JSON text. Raises: as `json_text.parse`."""
    if _ORJSON is not None:
        with suppress(ValueError):  # what it refuses is read again, for the reason, or because it is stricter
            values = _ORJSON.loads(record)
            json_text.check_depth(values, MAX_DEPTH)
            return values
    return json_text.parse(record, max_depth=MAX_DEPTH)


def _texts(values: dict[str, Any], key: str) -> tuple[list[str], bool]:
    """The text or texts under `key`, and whether it is a list of them."""
    value = _value_of(values, key)
    is_split = isinstance(value, list)
    sentences = [_text(one, value, key) for one in value] if is_split else [_text(value, value, key)]
    return sentences, is_split


def _value_of(values: dict[str, Any], key: str) -> Any:
    """The value under `key`: of that very name, or inside objects along its dots."""
    if key in values:
        return values[key]
    inner: Any = values
    for name in key.split("."):
        if not isinstance(inner, Mapping) or name not in inner:
            names = repr(", ".join(values))[1:-1]
            raise _BadRecordError(
                Reason.NO_KEY, f"there is no key {key!r}, only {names:.200}; name one with --json-keys."
            )
        inner = inner[name]
    return inner


def _text(one: Any, value: Any, key: str) -> str:
    """A string that has a form in UTF-8. Bytes, which columns may hold, are read as such."""
    if isinstance(one, bytes):
        try:
            return one.decode()
        except UnicodeDecodeError as error:
            detail = f"{key!r} is not UTF-8: byte {error.start} is {one[error.start]:#04x}; convert it."
            raise _BadRecordError(Reason.NOT_UTF8, detail) from error
    if not isinstance(one, str):
        shown = reprlib.repr(value)
        raise _BadRecordError(Reason.NOT_TEXT, f"{key!r} is {shown:.60}, not a text or a list of texts.")
    if not one.isascii():
        try:
            one.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
            raise _BadRecordError(
                Reason.LONE_SURROGATE,
                f"character {error.start} is {one[error.start]!a}, half of a surrogate pair; remove it.",
            ) from error
    return one


def _excerpt(record: bytes | dict[str, Any] | Unreadable) -> str:
    """The beginning of a record, in characters that can be written."""
    if isinstance(record, dict):
        values = {key: _start(value) if isinstance(value, bytes) else value for key, value in record.items()}
        return json.dumps(values, ensure_ascii=False, default=str)[:_EXCERPT_BYTES]
    return _start(record.start if isinstance(record, Unreadable) else record)


def _start(data: bytes) -> str:
    """The first characters; one that the limit cuts in two is left out, bytes that are none are spelled out."""
    return codecs.utf_8_decode(data[:_EXCERPT_BYTES].rstrip(b"\r\n"), "backslashreplace", False)[0]


def _printable(text: str) -> str:
    """The text with halves of surrogate pairs spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()
