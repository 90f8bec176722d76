"""Documents that are nearly right: a valid one with a value, a field, or some of its bytes changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

DEEP = "[" * 100_000 + "]" * 100_000
_ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**30, -(10**30), 10**400, 2**31, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "x", "0", "false", "../x", "/etc/passwd", "a\x00b", "a/b", "\ud800", "\u2028", "x" * 300,
    [], {}, [None], [[]], ["x"], [1, 2], {"x": 1}, {"0": None}, [{}], [0] * 50,
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from _places(child, (*path, key))


def _parent(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


@st.composite
def mutated_values(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three changes: a value that is another, a field that is gone, new, or there twice."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            break
        path = draw(st.sampled_from(places))
        parent, key = _parent(document, path), path[-1]
        match draw(st.sampled_from(["other", "other", "other", "gone", "twin", "wrapped"])):
            case "other":
                parent[key] = copy.deepcopy(draw(st.sampled_from(_ODD_VALUES)))
            case "gone":
                del parent[key]
            case "wrapped":
                parent[key] = draw(st.sampled_from([[parent[key]], {"x": parent[key]}, [parent[key]] * 2]))
            case "twin" if isinstance(parent, dict):
                parent[draw(st.sampled_from(["x", f"{key}x", "..", "\ud800"]))] = copy.deepcopy(parent[key])
            case _:
                parent.append(copy.deepcopy(parent[key]))
    return document


@st.composite
def mutated_bytes(draw: st.DrawFn, document: Any) -> bytes:
    """The text of a mutated document, or the document's own text with bytes changed, cut, or nested out of reach."""
    if draw(st.integers(0, 3)):
        return json.dumps(draw(mutated_values(document))).encode()
    text = json.dumps(document).encode()
    at = draw(st.integers(0, len(text) - 1))
    match draw(st.sampled_from(["cut", "byte", "mark", "utf-16", "deep", "list"])):
        case "cut":
            return text[:at]
        case "byte":
            return text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
        case "mark":
            return b"\xef\xbb\xbf" + text
        case "utf-16":
            return text.decode().encode("utf-16")
        case "deep":
            return b'{"a": ' + DEEP.encode() + b", " + text[1:]
    return b"[" + text + b"]"
