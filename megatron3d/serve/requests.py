"""From the body of a request to the texts that are asked about, or a sentence and a status that say what is wrong.

    {"text": T}   {"text": T, "pair": P}   {"texts": [T, ...]}   {"texts": [T, ...], "pairs": [P, ...]}

Pure functions of bytes: nothing here knows of a server.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from megatron3d.files.json_text import kind_of
from megatron3d.serve.description import ClassifierDescription

BAD_REQUEST, TOO_SLOW, TOO_LARGE, UNPROCESSABLE, OVERLOADED = 400, 408, 413, 422, 503
_FIELDS = ("text", "pair", "texts", "pairs")


class RequestError(Exception):
    """What is wrong with a request; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Sample:
    """One text, or a pair of texts."""

    text: str
    pair: str | None = None


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for, and what happens to texts that are too long for the model.

    Attributes:
        max_body_bytes: length of a body.
        max_texts: texts of a list.
        truncate: cut texts that are too long, as in training, instead of refusing them.
    """

    max_body_bytes: int = 1 << 20
    max_texts: int = 128
    truncate: bool = False


@dataclass(frozen=True)
class ParsedRequest:
    """The samples of a request, and whether it gave a list and gets one back."""

    samples: tuple[Sample, ...]
    is_list: bool


def parse(body: bytes, description: ClassifierDescription, limits: RequestLimits) -> ParsedRequest:
    """Read a request.

    Raises:
        RequestError: 400 where the body is no JSON object, 413 where it asks for too much, 422 where a field is
            missing, unknown, empty or of another type.
    """
    if len(body) > limits.max_body_bytes:
        raise too_large(limits)
    fields = _fields(body)
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        near = get_close_matches(unknown[0], _FIELDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RequestError(
            UNPROCESSABLE, f"the field {unknown[0]!r} is not known; {hint}The fields are {', '.join(_FIELDS)}"
        )
    if ("text" in fields) == ("texts" in fields):
        given = "both are given" if "text" in fields else "neither is given"
        raise RequestError(UNPROCESSABLE, f"give either 'text', a string, or 'texts', a list of strings; {given}")
    is_list = "texts" in fields
    stray = "pair" if is_list else "pairs"
    if stray in fields:
        raise RequestError(UNPROCESSABLE, f"{stray!r} does not go with {'texts' if is_list else 'text'!r}")
    texts = _texts(fields["texts"], "texts", limits) if is_list else (_text(fields["text"], "text"),)
    return ParsedRequest(_paired(texts, fields, is_list, description, limits), is_list)


def too_large(limits: RequestLimits) -> RequestError:
    """The refusal of a body that is too long."""
    return RequestError(TOO_LARGE, f"the body has more than {limits.max_body_bytes} bytes; send fewer or shorter texts")


def _fields(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise RequestError(BAD_REQUEST, 'the body is empty; send JSON such as {"text": "..."}')
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(BAD_REQUEST, f"the body is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(BAD_REQUEST, f"the body is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise RequestError(BAD_REQUEST, f'the body is {kind_of(value)}; send an object such as {{"text": "..."}}')
    return value


def _paired(
    texts: tuple[str, ...],
    fields: dict[str, Any],
    is_list: bool,
    description: ClassifierDescription,
    limits: RequestLimits,
) -> tuple[Sample, ...]:
    """The texts with their second halves, as the model wants them."""
    name = "pairs" if is_list else "pair"
    if name not in fields:
        if description.num_texts == 2:
            raise RequestError(
                UNPROCESSABLE, f"{description.task} compares two texts; give the second one in {name!r} too"
            )
        return tuple(Sample(text) for text in texts)
    if description.num_texts == 1:
        raise RequestError(UNPROCESSABLE, f"{description.task} judges single texts; leave {name!r} out")
    pairs = _texts(fields[name], name, limits) if is_list else (_text(fields[name], name),)
    if len(pairs) != len(texts):
        raise RequestError(UNPROCESSABLE, f"'texts' has {len(texts)} entries and 'pairs' {len(pairs)}; give as many")
    return tuple(Sample(text, pair) for text, pair in zip(texts, pairs))


def _texts(value: Any, name: str, limits: RequestLimits) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise RequestError(UNPROCESSABLE, f"{name!r} is {kind_of(value)}; it must be a list of strings")
    if not value:
        raise RequestError(UNPROCESSABLE, f"{name!r} is an empty list; give at least one text")
    if len(value) > limits.max_texts:
        raise RequestError(
            TOO_LARGE, f"{name!r} has {len(value)} texts and {limits.max_texts} are allowed; send several requests"
        )
    return tuple(_text(text, f"{name}[{number}]") for number, text in enumerate(value))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RequestError(UNPROCESSABLE, f"{name!r} is {kind_of(value)}; it must be a string")
    if not value.strip():
        raise RequestError(UNPROCESSABLE, f"{name!r} is empty; give a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            UNPROCESSABLE, f"{name!r} has half of a character (a surrogate) at position {error.start}"
        ) from error
    return value
