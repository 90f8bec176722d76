"""Which library finds the ids of a run's texts: the tokenizer's own, or a faster one that gives the same ids.

The faster one (`gigatoken_tokenizer.py`) is compared with the tokenizer's own library before the first text is
encoded: on texts of the input and on texts that are known to be cut differently by implementations that are almost
right. The choice never changes the output; where the ids differ the faster one is not used.
"""

# ruff: noqa: RUF001 (odd characters that look like Latin ones are meant)
from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from megatron3d.data.gigatoken_tokenizer import GigatokenTokenizer
from megatron3d.data.tokenizer_interface import Tokenizer
from megatron3d.errors import ConfigError, DataError

_SAMPLE_CHARACTERS = 1 << 18  # of the input's own text
_LONG_RUN = 3000
_BEHIND_MARKS = 0x20000  # the code points of combining marks end before it
_PLAIN_RUNS = ("a", "ab", " ", "\n", "\r\n", "\t", "1", "0123456789", ".", "-=", "é", "日", "🙂", "\u00a0", "\u200d")
# Spaces and line ends of all kinds, contractions, digits, joined emoji, names of special tokens, bytes of odd meaning.
_PARTS = (
    *(" ", "  ", "\t", "\n", "\r\n", "\r", "\x0b", "\x0c", "\u0085", "\u00a0", "\u1680", "\u2003", "\u2028", "\u3000"),
    *("\u200b", "\u200d", "\ufeff", "\x00", "\x1c", "a", "Z", "word", "don't", "WE'LL", "'s", "’s", "re'"),
    *("\u017f", "ß", "\u0130", "é", "e\u0301", "\u0301", "日本", "한국", "ไทย", "हिन्दी", "עברית", "العربية"),
    *(
        "\u01c5",
        "\ufb01",
        "\u212a",
        "\u2160",
        "1",
        "12",
        "123",
        "1234",
        "1,234.5",
        "\u0661\u0662",
        "\uff11\uff12",
        "²",
        "½",
    ),
    *("_", "__init__", "!", "...", "!?", "({[", "<", "/*", "🙂", "👨\u200d👩\u200d👧", "🇩🇪", "❤\ufe0f", "\U0001f3fd"),
    *("\U000e0041", "\ufffd", "\U0010ffff", "▁", "\u0120", "##", "<0x41>", "\u010a"),
    *("<|endoftext|>", "<|im_start|>", "<s>", "</s>", "<unk>", "<pad>", "[CLS]", "[MASK]", "<|", "endoftext|>"),
)


class Encoder(StrEnum):
    """What may be asked for: the tokenizer's own library, gigatoken, or the faster one that is there and agrees."""

    AUTO = "auto"
    REFERENCE = "reference"
    GIGATOKEN = "gigatoken"


@dataclass(frozen=True)
class OtherIds:
    """The first text with other ids, and both ids from the first that differs on."""

    text: str
    expected: list[int]
    found: list[int]

    @property
    def sentence(self) -> str:
        """What differs."""
        return (
            f"for {self.text!r:.60} gigatoken gives the ids {_start(self.found)} where the tokenizer's own are "
            f"{_start(self.expected)}"
        )


def build_encoder(encoder: Encoder, reference: Tokenizer) -> Tokenizer:
    """The tokenizer that encodes, for an encoder that was chosen. Raises: as `choose_encoder`."""
    return GigatokenTokenizer(reference) if encoder is Encoder.GIGATOKEN else reference


def choose_encoder(
    wanted: Encoder,
    reference: Tokenizer,
    texts: Sequence[str],
    note: Callable[[str], None],
    *,
    build: Callable[[Encoder, Tokenizer], Tokenizer] = build_encoder,
) -> Encoder:
    """The encoder of a run, after the comparison; `note` takes a line that says which one it is and why.

    Args:
        wanted: what was asked for.
        reference: the tokenizer as its own library gives it.
        texts: texts of the input, of which the first ones are compared.
        note: takes the line; not called where the tokenizer's own library was asked for, or no library is needed.
        build: `build_encoder`, or what keeps what it builds.

    Raises: ConfigError or DataError if gigatoken was asked for by name and is not installed, does not have this kind of
        tokenizer, or gives other ids.
    """
    if wanted is Encoder.REFERENCE or (wanted is Encoder.AUTO and reference.library is None):
        return Encoder.REFERENCE
    compared: list[str] = []
    try:
        faster = build(Encoder.GIGATOKEN, reference)
        compared = [*_first(texts), *hostile_texts(reference.tokens() or ())]
        difference = first_other_ids(reference, faster, compared)
        if difference is not None:
            raise DataError(difference.sentence)
    except (ConfigError, DataError) as error:
        if wanted is Encoder.GIGATOKEN:
            raise type(error)(f"--encoder gigatoken cannot be used: {error}; use --encoder auto.") from error
        note(f"--encoder auto: texts are encoded by {reference.library}, since {error}")
        return Encoder.REFERENCE
    note(f"--encoder {wanted}: texts are encoded by gigatoken, whose ids are the same for {len(compared)} texts")
    return Encoder.GIGATOKEN


def first_other_ids(reference: Tokenizer, other: Tokenizer, texts: Sequence[str]) -> OtherIds | None:
    """The first of `texts` to which the two give other ids; None if there is none.

    A text that `reference` refuses is left out: the run would end there.
    """
    dtype = np.dtype(np.int64)
    for text in texts:
        try:
            expected, _ = reference.encode_arrays([text], dtype)
        except DataError:
            continue
        found, _ = other.encode_arrays([text], dtype)
        if not np.array_equal(expected, found):
            size = min(len(expected), len(found))
            same = int(np.argmin([*(expected[:size] == found[:size]), False]))
            return OtherIds(text, expected[same:].tolist(), found[same:].tolist())
    return None


def hostile_texts(tokens: Sequence[str | None]) -> Iterator[str]:
    """Texts at which implementations differ: runs, mixtures of odd characters, combining marks, and added tokens.

    Args:
        tokens: the tokenizer's own, of which those that look special are put between words.
    """
    yield ""
    for run in _PLAIN_RUNS:
        yield run * (_LONG_RUN // len(run))
    for step in (1, 7, 13, 29):  # each is coprime to the number of parts, or at least meets many of them
        order = [_PARTS[(place * step) % len(_PARTS)] for place in range(len(_PARTS))]
        yield "".join(order)
        yield " ".join(order)
        yield "x".join(order)
    special = [token for token in tokens if token and token[0] in "<[" and token[-1] in ">]" and len(token) > 2]
    for token in special[:20]:
        yield f"{token}{token} a {token} b{token}c\n{token}"
    marks = [chr(code) for code in range(_BEHIND_MARKS) if unicodedata.combining(chr(code))]
    for first in range(0, len(marks), 32):
        yield "a" + "".join(marks[first : first + 32])


def _first(texts: Sequence[str]) -> list[str]:
    """The first texts, cut at the limit."""
    kept, size = [], 0
    for text in texts:
        kept.append(text[: _SAMPLE_CHARACTERS - size])
        size += len(kept[-1])
        if size >= _SAMPLE_CHARACTERS:
            break
    return kept


def _start(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:4])) + (", ..." if len(ids) > 4 else "") if ids else "(none)"
