"""Text to sentences by rules: no model, no download, no dependency, the same result everywhere.

Where a sentence may end is decided by punctuation and script; whether a dot ends one, by the word before it (a table
of abbreviations for each language, initials, ordinals) and the word after it (a small letter goes on).

    scripts with marks of their own   。！？ ।॥ ؟ ۔ ။ ៕ ። and their like end a sentence, spaces or not
    . ! ? …                           end one before a space, unless a small letter follows; quotes and brackets
                                      that close, and [3], belong to the sentence before
    a dot                             ends none inside a number or name (3.14, example.org), after Mr. or z.B., after
                                      an initial, after an ordinal where the language has them
    lines                             a blank line always ends a sentence; so does a line's end in a text with lines
                                      of over 100 characters, which are paragraphs and not lines of a book

Limits: Thai has no such marks and is cut at line ends alone; brackets of East Asian quotes hold their sentences
together; a title in capitals ("Yahoo! Inc.") may be cut.
"""

# ruff: noqa: RUF001 (punctuation of other scripts that looks like ASCII is meant)
from __future__ import annotations

import re
from collections.abc import Iterator

from megatron3d.data.prepare.abbreviations import LanguageRules

_WRAPPED_LINE_CHARACTERS = 100
_MAX_QUOTE_CHARACTERS = 300
_CLOSERS = "\"'”’»›«‹“‘)\\]}」』）】》〉＂"
_OPENERS = "\"'“‘«‹([{「『（【《〈¿¡„‚—–-*•"
_EAST_ASIAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_HARD = "。！？｡।॥؟۔။៕။።፧։՜՞꘎᠃᠉"
_END = re.compile(
    rf"(?P<hard>[{_HARD}][{_HARD}.!?…]*[{_CLOSERS}]*)"
    rf"|(?P<mark>[.!?…‽⁇⁈⁉;\u037e]+)(?:[{_CLOSERS}]|\[\d+\]|[ \u00a0\u202f]»)*"
    rf"(?=\s|\Z|(?<![.{_CLOSERS}])[{_EAST_ASIAN}])"
)
_WORD_BEFORE = re.compile(r"[^\s()\[\]{}«»“”„\"'‘’—–/,;:]+\Z")
_WORD_AFTER = re.compile(rf"[\s{re.escape(_OPENERS)}]*(?P<word>\w[\w'’]*)?(?P<initial>(?<=\b\w)\.)?")
_INITIALS = re.compile(r"(?:\w\.)*\w\Z")
_ROMAN = re.compile(r"[IVXLC]+\Z")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
_LINE_END = re.compile(r"\s*\n\s*")
_JAPANESE_QUOTING = ("と", "って", "、", "，")


def split_sentences(text: str, rules: LanguageRules, *, keep_newlines: bool = False) -> list[str]:
    """The sentences of `text` in order, without the spaces around them; nothing else is lost.

    With `keep_newlines` each keeps the line ends that follow it (Megatron-LM's option of this name).
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    spans = [span for first, stop in _paragraphs(text) for span in _sentences(text, first, stop, rules)]
    if not keep_newlines:
        return [text[first:stop] for first, stop in spans]
    nexts = [first for first, _ in spans[1:]] + [len(text)]
    return [text[first:stop] + "\n" * text.count("\n", stop, after) for (first, stop), after in zip(spans, nexts)]


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Stretches of `text` that no sentence crosses."""
    is_wrapped = max(map(len, text.split("\n"))) <= _WRAPPED_LINE_CHARACTERS
    first = 0
    for gap in (_BLANK_LINE if is_wrapped else _LINE_END).finditer(text):
        yield first, gap.start()
        first = gap.end()
    yield first, len(text)


def _sentences(text: str, first: int, stop: int, rules: LanguageRules) -> Iterator[tuple[int, int]]:
    """The sentences of one paragraph, without the spaces around them; none is empty."""
    for mark in _END.finditer(text, first, stop):
        if mark.start() >= first and _is_end(text, first, mark, stop, rules):
            yield from _without_spaces(text, first, mark.end())
            first = mark.end()
    yield from _without_spaces(text, first, stop)


def _without_spaces(text: str, first: int, stop: int) -> Iterator[tuple[int, int]]:
    stretch = text[first:stop]
    start = first + len(stretch) - len(stretch.lstrip())
    if start < stop:
        yield start, first + len(stretch.rstrip())


def _is_end(text: str, first: int, mark: re.Match[str], stop: int, rules: LanguageRules) -> bool:
    """Whether the sentence that began at `first` ends with `mark`."""
    end = mark.end()
    if mark["hard"] is not None:
        quoted = mark["hard"][-1] in "」』”）" and text.startswith(_JAPANESE_QUOTING, end)
        return not quoted and not _in_quote(text, first, end)
    after = _WORD_AFTER.match(text, end, stop)
    assert after is not None, "the pattern matches the empty text too"
    word_after = after["word"] or ""
    is_semicolon = mark["mark"] in (";", "\u037e")
    if word_after[:1].islower() or (is_semicolon and not rules.semicolon_asks):
        return False
    if mark["mark"] != "." or not word_after:
        return True
    if after["initial"]:
        word_after = word_after + "."
    before = _WORD_BEFORE.search(text, max(first, mark.start() - 40), mark.start())
    return before is None or _dot_ends(before, word_after, rules, at_start=not text[first : before.start()].strip())


def _dot_ends(before: re.Match[str], word_after: str, rules: LanguageRules, *, at_start: bool) -> bool:
    """Whether a single dot between two words ends a sentence; the next word, with its dot if it is an initial, does
    not begin with a small letter."""
    word = before[0]
    key = word.lower()
    if word.isdigit():
        return not (at_start or (rules.ordinal_dots and len(word) <= 2))
    if rules.ordinal_dots and _ROMAN.match(word):
        return False
    if key in rules.never or (key in rules.numbered and word_after[0].isdigit()):
        return False
    has_case = word[-1].lower() != word[-1].upper()
    if key in rules.maybe or (has_case and _INITIALS.match(word)):
        return word_after.lower() in rules.starters
    return True


def _in_quote(text: str, first: int, end: int) -> bool:
    """Whether a bracket of East Asian quotes is open between `first` and `end`, and not for too long."""
    if end - first > _MAX_QUOTE_CHARACTERS:
        return False
    return any(
        text.count(opening, first, end) > text.count(closing, first, end) for opening, closing in ("「」", "『』")
    )
