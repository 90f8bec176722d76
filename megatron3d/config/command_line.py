"""A command line as flags with their values, before anything is known of what they mean.

argparse stops at the first word that it cannot place; here every word finds a place, so that all of them can be judged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class GivenFlag:
    """One flag as it was written: its name, and the words up to the next flag or the one after an equals sign."""

    name: str
    values: tuple[str, ...] = ()
    has_equals: bool = False

    @property
    def text(self) -> str:
        """The flag and its values, as messages show them."""
        return " ".join((self.name, *self.values))


def split_command_line(argv: Iterable[str]) -> tuple[tuple[GivenFlag, ...], tuple[str, ...]]:
    """The flags of a command line with their values, and the words before the first flag.

    A word is a flag if it begins with a hyphen and is neither a number nor a hyphen alone.
    """
    groups: list[tuple[str, list[str], bool]] = []
    stray: list[str] = []
    for word in argv:
        if _is_flag(word):
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else [], bool(equals)))
        elif groups:
            groups[-1][1].append(word)
        else:
            stray.append(word)
    return tuple(GivenFlag(name, tuple(values), equals) for name, values, equals in groups), tuple(stray)


def stray_sentence(word: str, place: str) -> str:
    """The problem with a word that no flag takes."""
    return f"'{word}' stands alone near {place} and belongs to no flag; put the flag it is meant for before it."


def _is_flag(word: str) -> bool:
    if not word.startswith("-") or word == "-":
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False
