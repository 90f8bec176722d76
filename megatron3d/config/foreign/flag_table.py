"""The table of another program's flags that are no option here, read from a dated file and checked row by row."""

from __future__ import annotations

import datetime
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from megatron3d.config.options import BY_KEY

Kind = Literal["how", "done", "report"]
_ARITIES = (("0", "switches"), ("1", "valued"), ("*", "lists"))


@dataclass(frozen=True)
class UpstreamVersion:
    """Which version of the other program the table follows."""

    repository: str
    file: str
    version: str
    commit: str
    date: datetime.date


@dataclass(frozen=True)
class Accepted:
    """Flags without effect here, by how many values follow: none (`switches`), one (`valued`), any (`lists`).

    `kind` says why nobody counts on them: they choose *how* the same result is reached (speed, memory, formats), they
    ask for what is *done* anyway, or they ask for a *report* that `reason` names another source of.
    """

    kind: Kind
    reason: str
    switches: tuple[str, ...] = ()
    valued: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """Flags of a feature that is not here.

    `only_with_experts`: they concern mixtures of experts alone, so they are without effect in a dense model.
    """

    instead: str
    flags: tuple[str, ...]
    only_with_experts: bool = False


@dataclass(frozen=True)
class FlagTable:
    """All rows of one file.

    Attributes:
        source: the version that the rows follow.
        synonyms: flag -> options of ours that it sets; later flags win over earlier ones.
        fitting: (flag, option that it sets) -> other values that the option's own flag may give beside it.
        harmless_values: flag -> the value at which it asks for what is done anyway.
        accepted: flags that are accepted with a line.
        refused: flags that are refused with what to use instead.
    """

    source: UpstreamVersion
    synonyms: Mapping[str, Mapping[tuple[str, str], Any]]
    fitting: Mapping[tuple[str, tuple[str, str]], tuple[Any, ...]]
    harmless_values: Mapping[str, str]
    accepted: tuple[Accepted, ...]
    refused: tuple[Refused, ...]

    def reason_and_arity(self, flag: str) -> tuple[str, str] | None:
        """(reason, number of values as in argparse: 0, 1 or *) of a flag that is accepted without effect, or None."""
        for row in self.accepted:
            for arity, names in _ARITIES:
                if flag in getattr(row, names):
                    return row.reason, arity
        return None

    def instead_of(self, flag: str) -> str | None:
        """What to use instead of a flag whose feature is not here, or None if the flag is not such a one."""
        for row in self.refused:
            if flag in row.flags:
                return row.instead
        return None

    def needs_experts(self, flag: str) -> bool:
        """Whether a refused flag is without effect in a dense model."""
        return any(row.only_with_experts and flag in row.flags for row in self.refused)


def read_flag_table(path: Path) -> FlagTable:
    """The table in a TOML file.

    Raises:
        ValueError: a field that is missing, unknown or of the wrong type, a flag that is listed twice or not written as
            one, or a synonym of an option that does not exist; the message names all of these.
    """
    parsed = tomllib.loads(path.read_text(encoding="utf-8"))
    if problems := list(_problems(parsed)):
        raise ValueError(f"{path.name} cannot be used: {'; '.join(problems)}.")
    return FlagTable(
        UpstreamVersion(**parsed["source"]),
        MappingProxyType({row["flag"]: _options(row["sets"]) for row in _rows(parsed, "synonym")}),
        MappingProxyType(
            {
                (row["flag"], key): tuple(values)
                for row in _rows(parsed, "synonym")
                for key, values in _options(row.get("fitting", {})).items()
            }
        ),
        MappingProxyType(parsed.get("harmless_values", {})),
        tuple(Accepted(**_with_tuples(row)) for row in _rows(parsed, "accepted")),
        tuple(Refused(**_with_tuples(row)) for row in _rows(parsed, "refused")),
    )


def _options(sets: Mapping[str, Any]) -> Mapping[tuple[str, str], Any]:
    return MappingProxyType({_key(name): value for name, value in sets.items()})


def _key(name: str) -> tuple[str, str]:
    section, _, field = name.partition(".")
    return section, field


def _with_tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


# Fields that a row of each part of the file must have, with their types.
_REQUIRED: Mapping[str, Mapping[str, type]] = {
    "source": {"repository": str, "file": str, "version": str, "commit": str, "date": datetime.date},
    "synonym": {"flag": str, "sets": dict},
    "accepted": {"kind": str, "reason": str},
    "refused": {"instead": str, "flags": list},
}
# Lists of flags that it may have.
_FLAG_LISTS: Mapping[str, tuple[str, ...]] = {
    "accepted": ("switches", "valued", "lists"),
    "refused": ("flags",),
}
# Other fields that it may have.
_OPTIONAL: Mapping[str, Mapping[str, type]] = {
    "synonym": {"fitting": dict},
    "refused": {"only_with_experts": bool},
}


def _problems(parsed: Mapping[str, Any]) -> Iterator[str]:
    parts = {*_REQUIRED, "harmless_values"}
    if "source" not in parsed or not parsed.keys() <= parts:
        yield f"its parts are {', '.join(sorted(parsed))} and must be source and some of {', '.join(sorted(parts))}"
        return
    shapes = [problem for part in _REQUIRED for row in _rows(parsed, part) for problem in _problems_of_row(part, row)]
    yield from shapes
    if shapes:
        return
    for row in _rows(parsed, "accepted"):
        if row["kind"] not in get_args(Kind):
            yield f"kind {row['kind']!r} of {row['reason']!r} is not one of {', '.join(get_args(Kind))}"
    for row in _rows(parsed, "synonym"):
        yield from _problems_of_synonym(row["flag"], row["sets"].items())
        fitting = row.get("fitting", {})
        yield from (
            f"fitting of {row['flag']} names {name}, which it does not set" for name in fitting.keys() - row["sets"]
        )
        yield from _problems_of_synonym(row["flag"], ((name, one) for name in fitting for one in fitting[name]))
    flags = [*_listed(parsed), *(row["flag"] for row in _rows(parsed, "synonym"))]
    for flag, count in Counter(flags).items():
        if count > 1:
            yield f"{flag} is listed {count} times"
    for flag in (*flags, *parsed.get("harmless_values", ())):
        if not flag.startswith("--") or len(flag.split()) != 1:
            yield f"{flag!r} is not a flag, which is one word and begins with two hyphens"


def _rows(parsed: Mapping[str, Any], part: str) -> Iterable[Mapping[str, Any]]:
    rows = parsed.get(part, [])
    return rows if isinstance(rows, list) else [rows]


def _problems_of_row(part: str, row: Mapping[str, Any]) -> Iterator[str]:
    required, lists = _REQUIRED[part], _FLAG_LISTS.get(part, ())
    types = {**required, **_OPTIONAL.get(part, {})}
    for name in sorted({*required} - {*row}):
        yield f"a row of {part} has no {name}: {dict(row)}"
    for name, value in row.items():
        if name in lists:
            is_right = isinstance(value, list) and all(isinstance(flag, str) for flag in value)
        else:
            is_right = name in types and isinstance(value, types[name])
        if not is_right:
            yield f"{name} = {value!r} does not belong into a row of {part}"


def _problems_of_synonym(flag: str, sets: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for name, value in sets:
        option = BY_KEY.get(_key(name))
        if option is None:
            yield f"{flag} sets {name}, which is no option"
            continue
        try:
            option.convert(value)
        except ValueError as error:
            yield f"{flag} sets {name}: {error}"


def _listed(parsed: Mapping[str, Any]) -> Iterator[str]:
    for part, lists in _FLAG_LISTS.items():
        for row in _rows(parsed, part):
            for name in lists:
                yield from row.get(name, ())
