"""JSON from outside ends in a value or in a ValueError, whatever it is."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.files.fields import Fields
from megatron3d.files.json_text import MAX_DEPTH, parse, parse_object
from tests.files.mutations import DEEP, mutated_bytes

DOCUMENT = {"a": {"b": [1, {"c": "d"}]}, "e": None}


@pytest.mark.parametrize("text", [DEEP, DEEP.replace("[", '{"a":').replace("]", "}"), "[" * 100_000])
def test_nesting_without_end_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"nested too deep|Expecting value"):
        parse(text)


def nested(levels: int) -> str:
    """An object that nests so many levels."""
    return '{"a": ' * levels + "1" + "}" * levels


def test_a_document_may_nest_so_deep_and_no_deeper() -> None:
    assert parse_object(nested(MAX_DEPTH))
    with pytest.raises(ValueError, match=f"nested deeper than {MAX_DEPTH} levels"):
        parse_object(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1]", "it holds a list and must hold an object"),
        (b"null", "it holds null"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        (b"{} {}", "Extra data"),
        ('{"a": 1}'.encode("utf-16"), "it is UTF-16"),
        (b'{"a": "\xff"}', "it is not UTF-8: byte 7 is 0xff"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    ],
)
def test_what_is_no_document_is_a_value_error_that_says_why(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_object(data)


def test_pairs_of_surrogates_and_byte_order_marks_are_fine() -> None:
    assert parse_object(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@settings(deadline=None)
@given(mutated_bytes(DOCUMENT))
def test_any_text_gives_a_value_that_can_be_written_again_or_a_value_error(data: bytes) -> None:
    try:
        found = parse_object(data)
    except ValueError:
        return
    json.dumps(found, ensure_ascii=False).encode()


_READERS = ("integer", "integers", "text", "texts", "flag", "interval", "entries", "objects", "rows")


@pytest.mark.parametrize("reader", _READERS)
@given(value=st.sampled_from([None, True, 1, -1, 1.5, 10**30, math.nan, "a", [], [1], [1, 2], ["a"], {}, {"a": {}}]))
def test_a_field_is_of_the_type_that_is_read_or_is_named(reader: str, value: Any) -> None:
    fits: dict[str, Any] = {
        "integer": type(value) is int and 0 <= value < 2**63,
        "integers": isinstance(value, list) and all(type(one) is int for one in value),
        "text": isinstance(value, str),
        "texts": isinstance(value, list) and all(isinstance(one, str) for one in value),
        "flag": isinstance(value, bool),
        "interval": value is None or value == [1, 2],
        "entries": isinstance(value, dict),
        "objects": isinstance(value, dict),
        "rows": value == [],
    }
    read = getattr(Fields({"it": value}, "the document"), reader)
    if fits[reader]:
        read("it")
        return
    with pytest.raises(ValueError, match=r"it|the document"):
        read("it")
    with pytest.raises(ValueError, match="the document has no field 'other'"):
        read("other")
