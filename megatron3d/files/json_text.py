"""JSON that others wrote: whatever is wrong with it is a `ValueError` whose message says what.

`json.loads` has two more ways to fail: text that is not UTF-8, and values nested so deep that its recursion ends in a
RecursionError. A document that is kept and written again, or walked through, must also leave room for the recursion
of whoever does that.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from megatron3d.files.text import decode

MAX_DEPTH = 100  # of a document; those of our formats and of Hugging Face's nest below 12
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class NestingError(ValueError):
    """JSON that is nested too deep."""


def parse(data: bytes | str, *, unique_keys: bool = False, max_depth: int | None = None) -> Any:
    """The value of a JSON text.

    With `unique_keys` an object must not have a key twice, of which JSON's readers take the last without a word.
    Without `max_depth` the limit of the nesting is what is left of Python's for recursion, which depends on the caller.

    Raises:
        ValueError: it is not UTF-8, not JSON, or has a key twice and must not.
        NestingError: it is nested deeper than `max_depth` levels, or too deep to be read.
    """
    text = data if isinstance(data, str) else decode(data)
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise NestingError("it is nested too deep") from error
    # Brackets are counted first, which takes no time: few texts have more of them than levels are allowed.
    if max_depth is not None and text.count("[") + text.count("{") > max_depth:
        check_depth(value, max_depth)
    return value


def check_depth(value: Any, max_depth: int) -> None:
    """Raises: NestingError if the value of a JSON text is nested deeper than `max_depth` levels."""
    if _is_deeper(value, max_depth):
        raise NestingError(f"it is nested deeper than {max_depth} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values. Raises: ValueError for a key that stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has the key {twice!r:.60} twice in one object; keep one of them")
    return found


def parse_object(data: bytes | str, *, unique_keys: bool = False) -> dict[str, Any]:
    """The value of a JSON text that must be an object; `unique_keys` as in `parse`.

    Raises:
        ValueError: as `parse`; or it is another kind of value, nested deeper than MAX_DEPTH, or has a string with half
            of a surrogate pair.
    """
    text = data if isinstance(data, str) else decode(data)
    value = parse(text, unique_keys=unique_keys)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {kind_of(value)} and must hold an object")
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    if _SURROGATE.search(text):
        # Halves of surrogate pairs can be spelled in JSON but neither printed nor written.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def kind_of(value: Any) -> str:
    """What JSON calls the type of a value, with its article."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def is_whole_number(value: Any, least: int, most: int = 2**63 - 1) -> bool:
    """Whether a value is a whole number from `least` to `most`; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists nest deeper than so many levels; level by level, for recursion is what may not be."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        children = (one.values() if isinstance(one, dict) else one for one in level)
        level = [child for each in children for child in each if isinstance(child, (dict, list))]
        if not level:
            return False
    return True
