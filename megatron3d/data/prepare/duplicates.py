"""Which texts of a corpus are duplicates of an earlier one: exactly, or nearly by MinHash.

Two texts are exact duplicates if they agree after `normalized`: Unicode's NFC, and each run of white space as one
blank. Two are near duplicates if the sets of their n-grams have a Jaccard similarity (those in both, of those in
either) of at least a threshold. The similarity is estimated: the share of equal entries of two signatures of P hashes,
whose standard error is sqrt(s (1 - s) / P) at the similarity s. A text is compared with those that were kept and not
with dropped ones, so that whatever is dropped is near a text that stays; the first of a group stays.

Source: A. Broder, On the resemblance and containment of documents (1997); J. Leskovec et al., Mining of Massive
Datasets, section 3.4, for the bands, which find candidates without comparing all pairs. Signatures and bands are those
of the package rensa.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron3d.errors import ConfigError, install_extra

NGRAM_UNITS = ("words", "characters")
_WORD = re.compile(r"\w+")
_DIGEST_BYTES = 16
_MAX_MISS = 0.01  # the probability that two texts of just the threshold share no band, at most
_SEED = 1


@dataclass(frozen=True)
class NearRule:
    """When two texts are near duplicates: from the similarity `threshold` on, of n-grams of words or characters, by
    signatures of `num_perm` hashes."""

    threshold: float = 0.8
    num_perm: int = 128
    ngram: int = 5
    unit: str = "words"

    @property
    def num_bands(self) -> int:
        """Bands of a signature, as few as find a pair of just the threshold with a probability of 99 %."""
        divisors = (bands for bands in range(1, self.num_perm + 1) if self.num_perm % bands == 0)
        return next(b for b in divisors if self._miss(b) <= _MAX_MISS or b == self.num_perm)

    def _miss(self, bands: int) -> float:
        return (1 - self.threshold ** (self.num_perm // bands)) ** bands


@dataclass(frozen=True)
class Duplicate:
    """A text is a duplicate of kept text number `of`; `similarity` is estimated, or 1 for an exact one."""

    of: int
    similarity: float
    is_exact: bool


def normalized(text: str) -> str:
    """The text in NFC, with one blank for each run of white space and none at its ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def ngrams(text: str, rule: NearRule) -> set[str]:
    """The n-grams of the words of a text (runs of letters and digits, in lower case), or of its characters.

    A text of fewer than n has itself as the only one; one without a word or character has none.
    """
    lowered = normalized(text).lower()
    parts = _WORD.findall(lowered) if rule.unit == "words" else lowered
    glue = " " if rule.unit == "words" else ""
    if not parts:
        return set()
    return {glue.join(parts[i : i + rule.ngram]) for i in range(max(1, len(parts) - rule.ngram + 1))}


class DuplicateFinder:
    """The texts kept so far, numbered from 0, and whether the next one is a duplicate of one of them.

    Keeps of each text a digest of 16 bytes for exact duplicates, and for near ones a signature of 4 bytes a hash and
    an entry a band: 0.2 KB and, with the default rule, 4 KB as measured.
    """

    def __init__(self, *, exact: bool, near: NearRule | None) -> None:
        """Begin without texts. Raises: ConfigError if `near` is given and its package is not installed."""
        self._seen: dict[bytes, int] | None = {} if exact else None
        self._near = None if near is None else _NearIndex(near)
        self.num_kept = 0

    def add(self, text: str) -> Duplicate | None:
        """Which kept text this one is a duplicate of; or None, and then it is kept."""
        if self._seen is not None:
            digest = hashlib.blake2b(normalized(text).encode(), digest_size=_DIGEST_BYTES).digest()
            if (same := self._seen.setdefault(digest, self.num_kept)) != self.num_kept:
                return Duplicate(same, 1.0, is_exact=True)
        found = None if self._near is None else self._near.add(text, self.num_kept)
        if found is None:
            self.num_kept += 1
        elif self._seen is not None:
            self._seen[digest] = found.of  # a later copy of this text is one of the text that stays
        return found


class _NearIndex:
    """Signatures of the kept texts, and the bands by which candidates are found."""

    def __init__(self, rule: NearRule) -> None:
        self._rule, self._library = rule, _rensa()
        self._bands = self._library.RMinHashLSH(rule.threshold, rule.num_perm, rule.num_bands)
        self._signatures: NDArray[np.uint32] = np.empty((1024, rule.num_perm), dtype=np.uint32)

    def add(self, text: str, number: int) -> Duplicate | None:
        """The kept text that is most like this one, the earlier of equals; or None, and then this is kept `number`."""
        grams = ngrams(text, self._rule)
        if not grams:
            return None
        minhash = self._library.RMinHash(self._rule.num_perm, _SEED)
        minhash.update(list(grams))
        signature = np.asarray(minhash.digest(), dtype=np.uint32)
        candidates = np.unique(np.asarray(self._bands.query(minhash), dtype=np.int64))
        if len(candidates):
            similarities = (self._signatures[candidates] == signature).mean(axis=1)
            best = int(np.argmax(similarities))
            if similarities[best] >= self._rule.threshold:
                return Duplicate(int(candidates[best]), float(similarities[best]), is_exact=False)
        if number >= len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[number] = signature
        self._bands.insert(number, minhash)
        return None


def check_near_rule(rule: NearRule) -> None:
    """Raises: ConfigError with all that is wrong with a rule."""
    problems = []
    if not (math.isfinite(rule.threshold) and 0 < rule.threshold <= 1):
        problems.append(f"--near {rule.threshold:g} is not a similarity over 0 and up to 1, such as 0.8.")
    for flag, value in (("--num-perm", rule.num_perm), ("--ngram", rule.ngram)):
        if value < 1:
            problems.append(f"{flag} {value} is not at least 1.")
    if problems:
        raise ConfigError("\n".join(problems))


def _rensa() -> Any:
    try:
        return importlib.import_module("rensa")
    except ImportError as error:
        raise ConfigError(f"--near needs the package rensa; run: {install_extra('dedup')}") from error
