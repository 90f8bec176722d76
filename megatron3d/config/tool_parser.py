"""argparse for tools, which reports all that is wrong with the words of a command in one answer.

argparse stops at the first problem, and a missing option hides a misspelt one, which is often the same mistake.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


def too_small(options: Iterable[tuple[str, int | None, int]]) -> list[str]:
    """A sentence for each (flag, value, least) whose value is given and below the least."""
    return [
        f"{flag} {value} is outside its range; it must be at least {least}."
        for flag, value, least in options
        if value is not None and value < least
    ]


class ToolParser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations that collects problems; exit code 2 as ever."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "exit_on_error": False, **settings})
        self._problems: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Options, and no words left over: words that are not understood are problems, too."""
        words = [*(sys.argv[1:] if args is None else args)]
        required = [one for one in self._actions if one.required]
        groups = [one for one in self._mutually_exclusive_groups if one.required]
        self._problems, wrong = [], set()
        for one in (*required, *groups):
            one.required = False
        try:
            while True:
                try:
                    found, left = super().parse_known_args(words, namespace)
                    break
                except argparse.ArgumentError as error:
                    self._problems.append(str(error))
                    at = self._first_word(words, error.argument_name)
                    if at is None:
                        self.error("")
                    wrong.add(self._option_string_actions[words[at].split("=")[0]].dest)
                    del words[at : self._end_of_values(words, at)]
        finally:
            for one in (*required, *groups):
                one.required = True
        missing = [
            one for one in required if one.dest not in wrong and getattr(found, one.dest, one.default) is one.default
        ]
        if missing:
            names = ", ".join("/".join(one.option_strings) or str(one.metavar or one.dest) for one in missing)
            self._problems.append(f"the following arguments are required: {names}")
        for group in groups:
            if all(one.dest not in wrong and getattr(found, one.dest) is one.default for one in group._group_actions):
                names = " ".join(one.option_strings[0] for one in group._group_actions if one.option_strings)
                self._problems.append(f"one of the arguments {names} is required")
        self._problems += [self._unknown(word) for word in left if word.startswith("-")]
        if self._problems or left:
            self.error("" if self._problems else f"unrecognized arguments: {' '.join(left)}")
        return found, []

    def error(self, message: str) -> NoReturn:
        """Print the problems that were collected, and `message`, and exit with code 2."""
        super().error("\n".join([*self._problems, *([message] if message else [])]))

    def _first_word(self, words: Sequence[str], name: str | None) -> int | None:
        """Where the option that argparse names, such as "--steps/-s", stands in the command; the last time counts."""
        spellings = (name or "").split("/")
        places = [at for at, word in enumerate(words) if word.split("=")[0] in spellings]
        return places[-1] if places else None

    def _end_of_values(self, words: Sequence[str], at: int) -> int:
        """Where the words behind an option and its values begin."""
        end = at + 1
        while "=" not in words[at] and end < len(words) and not words[end].startswith("--"):
            end += 1
        return end

    def _unknown(self, word: str) -> str:
        """The sentence for an option that is not known, with the nearest one that is."""
        name = word.split("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, 1, 0.75)
        near = near or [one for one in self._option_string_actions if len(name) > 4 and one.startswith(name)]
        return f"unrecognized argument: {name}" + (f"; did you mean {' or '.join(near)}?" if near else "")
