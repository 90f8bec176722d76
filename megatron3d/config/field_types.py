"""Whether a value of a stored run is of the type that its field declares; JSON says nothing about that by itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

_MOST = 2**63 - 1  # of whole numbers: steps, samples and sizes all travel in int64


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST


def _is_float(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_tuple_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(map(is_one, value))


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_int, value))


# Every annotation that a section uses -> a test, and its name in messages.
_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "bool": (lambda value: isinstance(value, bool), "true or false"),
        "int": (_is_int, "a whole number"),
        "float": (_is_float, "a finite number"),
        "str": (lambda value: isinstance(value, str), "a string"),
        "tuple[str, ...]": (_is_tuple_of(lambda value: isinstance(value, str)), "a list of strings"),
        "tuple[tuple[int, int], ...]": (_is_tuple_of(_is_pair), "a list of pairs of whole numbers"),
    }
)


def wanted_type(field: dataclasses.Field[Any], value: Any) -> str | None:
    """What the value of a section's field must be, as a phrase, if it is not that.

    Lists must have become tuples already.
    """
    annotation = str(field.type).removesuffix(" | None")
    if value is None and annotation != str(field.type):
        return None
    is_one, name = _TYPES[annotation]
    return None if is_one(value) else name
