"""Two measures of English text by its words alone: lexical diversity (MTLD) and Flesch's reading ease.

Both see words as runs of letters, digits and apostrophes. They are made for English; of other languages, or of code,
they give numbers that order texts among themselves and mean nothing more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MTLD_THRESHOLD = 0.72
_WORDS = re.compile("[^\\W_]+(?:['\u2019][^\\W_]+)*")
_SENTENCE_ENDS = re.compile("[.!?]+(?=\\s|$|[\"'\u201d\u2019)])")
_VOWELS = re.compile(r"[aeiouy]+")


def words_of(text: str) -> list[str]:
    """The words of a text in small letters."""
    return _WORDS.findall(text.lower())


def mtld(words: Sequence[str]) -> float:
    """The mean number of words over which the share of different words stays above 0.72; 0 of no words.

    The mean of the measure read forwards and backwards. A rest below a whole factor counts by how far it came; where
    not even that is (all words differ), the length of the text stands.

    Source: P. McCarthy, S. Jarvis, MTLD, vocd-D, and HD-D (Behavior Research Methods 42, 2010), with their 0.72.
    """
    if not words:
        return 0.0
    return (_mtld_in_order(words) + _mtld_in_order(reversed(words))) / 2


def reading_ease(text: str) -> float:
    """Flesch's score, about 0 (hard) to 100 (easy), without bounds; 100 for a text without a word.

    206.835 - 1.015 x words / sentences - 84.6 x syllables / words. The rest of a text after its last full stop is a
    sentence.

    Source: R. Flesch, A new readability yardstick (Journal of Applied Psychology 32, 1948).
    """
    words = words_of(text)
    if not words:
        return 100.0
    ends = [found.end() for found in _SENTENCE_ENDS.finditer(text)]
    num_sentences = max(1, len(ends) + bool(words_of(text[ends[-1] :] if ends else "")))
    num_syllables = sum(map(syllables, words))
    return 206.835 - 1.015 * len(words) / num_sentences - 84.6 * num_syllables / len(words)


def syllables(word: str) -> int:
    """The syllables of an English word in small letters, by rule: groups of vowels without a silent e; at least 1."""
    count = len(_VOWELS.findall(word))
    if word.endswith("e") and not word.endswith("le") and not word.endswith("ee"):
        count -= 1
    if word.endswith("es") and not word.endswith(("ses", "zes", "ces", "ges", "xes", "ches", "shes", "les", "ies")):
        count -= 1
    if word.endswith("ed") and not word.endswith(("ted", "ded", "ied")):
        count -= 1
    if re.search(r"[^aeiou]le$", word) is None and word.endswith("le"):
        count -= 1
    return max(1, count)


def _mtld_in_order(words: Iterable[str]) -> float:
    """Words by factors, in one direction."""
    seen: set[str] = set()
    num_words = since = factors = 0
    for word in words:
        num_words, since = num_words + 1, since + 1
        seen.add(word)
        if len(seen) / since <= MTLD_THRESHOLD:
            factors, since = factors + 1, 0
            seen.clear()
    rest = (1 - len(seen) / since) / (1 - MTLD_THRESHOLD) if since else 0.0
    return num_words / (factors + rest) if factors + rest else float(num_words)
