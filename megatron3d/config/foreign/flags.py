"""The fate of words that are no option of ours: what they set, what is reported, and which are mistakes.

A flag of Megatron-LM or one of its forks has its fate in a table (see `megatron.py`). Any other word is unknown; the
hint at it comes from the names of other frameworks (`names.py`) or a near-identical spelling.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import combinations
from typing import Any

from megatron3d.config.command_line import GivenFlag, stray_sentence
from megatron3d.config.derive import TOKENIZER_ALIASES
from megatron3d.config.foreign.megatron import TABLES
from megatron3d.config.foreign.names import ADVICE_BY_FOREIGN_NAME, OPTION_BY_FOREIGN_NAME, plain_name
from megatron3d.config.foreign.zero_bubble import ZERO_BUBBLE_SWITCHES, ZERO_BUBBLE_VALUED
from megatron3d.config.options import BY_KEY, BY_SPELLING, Settings

# Flags of this program that are no option of a run.
OWN_FLAGS = ("--config", "--preset", "--deepspeed_config", "--deepspeed-config", "--help")

_ALL_SYNONYMS: Mapping[str, Mapping[tuple[str, str], Any]] = {
    flag: sets for table in TABLES for flag, sets in table.synonyms.items()
}
_ALL_HARMLESS: Mapping[str, str] = {flag: value for table in TABLES for flag, value in table.harmless_values.items()}

# Flags whose value an option of ours takes: the value's key, and what else the flag sets.
_VALUED_SYNONYMS: Mapping[str, tuple[tuple[str, str], Mapping[tuple[str, str], Any]]] = {
    "--tokenizer-name-or-path": (("data", "tokenizer_model"), {("data", "tokenizer_type"): "HuggingFaceTokenizer"}),
    "--remote-device": (("parallel", "offload_params"), {}),
    "--expert-interval": (("model", "moe_layer_freq"), {}),
}
# Spellings are suggested from here on: one letter of ten may differ, words may be missing in a long name.
_NEAR = 0.83
# The fewest letters that count as an abbreviation, and the most options that are suggested for one.
_SHORTEST, _MOST_MEANT = 3, 6
_NEGATIONS = ("no-", "disable-", "without-", "dont-")


@dataclass
class Verdict:
    """What foreign words come to.

    Attributes:
        settings: what they set, for our options' own flags to override.
        problems: sentences about words that cannot be used.
        lines: sentences about words without effect.
        meant: options that an unusable word was probably meant for.
        zero_bubble: the zero-bubble fork's switches, which are judged when the number of stages is known.
    """

    settings: dict[tuple[str, str], Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    meant: set[str] = field(default_factory=set)
    zero_bubble: dict[str, tuple[str, ...]] = field(default_factory=dict)


def judge(flags: Iterable[GivenFlag], *, is_dense: bool = False) -> Verdict:
    """The fate of each flag, in order; of synonyms of one option the later row of the table counts. `is_dense` says
    that a dense model is asked for, in which flags of experts are without effect."""
    flags = tuple(flags)
    verdict = Verdict()
    for flag in flags:
        if flag.name in _ALL_SYNONYMS:
            verdict.problems += [stray_sentence(word, flag.name) for word in flag.values]
        elif flag.name in (*ZERO_BUBBLE_SWITCHES, *ZERO_BUBBLE_VALUED):
            _keep_zero_bubble(flag, verdict)
        elif flag.name in _VALUED_SYNONYMS and not _is_harmless(flag):
            _judge_valued(flag, verdict)
        else:
            _judge_other(flag, verdict, is_dense)
    names = {flag.name for flag in flags}
    for name, values in _ALL_SYNONYMS.items():
        if name in names:
            verdict.settings.update(values)
    return verdict


def contradictions(flags: Iterable[GivenFlag], given: Settings) -> Iterator[str]:
    """A sentence for each flag that stands for a value of an option which `given`, or another flag, has otherwise."""
    meant: dict[tuple[str, str], list[tuple[GivenFlag, Any]]] = {}
    for flag in flags:
        for key, value in synonym_settings(flag).items():
            meant.setdefault(key, []).append((flag, value))
    for key, ways in meant.items():
        spelling, other = BY_KEY[key].spelling, given.get(key)
        other = TOKENIZER_ALIASES.get(other, other) if isinstance(other, str) else other
        for flag, value in ways:
            if other is not None and not _fits(flag, key, other):
                yield f"{flag.text} means {spelling} {value}, but {spelling} is {other}; give only one of them."
        for (one, value), (two, another) in combinations(ways, 2):
            if not _fits(one, key, another) and not _fits(two, key, value):
                yield (
                    f"{one.text} means {spelling} {value} and {two.text} means {spelling} {another}; give only one of "
                    "them."
                )


def synonym_settings(flag: GivenFlag) -> Mapping[tuple[str, str], Any]:
    """The options that a synonym sets; none for other flags."""
    if flag.name not in _VALUED_SYNONYMS:
        return _ALL_SYNONYMS.get(flag.name, {})
    if not flag.values or _is_harmless(flag):
        return {}
    key, more = _VALUED_SYNONYMS[flag.name]
    value = flag.values[0]
    if flag.name == "--expert-interval" and value.isdecimal() and int(value) > 0:
        value = f"{int(value) - 1}::{int(value)}"  # every n-th layer, beginning with layer n - 1
    return {key: value, **more}


def _fits(flag: GivenFlag, key: tuple[str, str], value: Any) -> bool:
    """Whether an option that a synonym sets may have a value beside it."""
    return value == synonym_settings(flag)[key] or any(
        value in table.fitting.get((flag.name, key), ()) for table in TABLES
    )


def flags_meant(flag: str) -> tuple[str, ...]:
    """The flags of ours that an unknown flag may have been meant to be, the nearest first.

    They are found by its name elsewhere, as a slip of spelling, or as an abbreviation, which may be that of several.
    """
    name = plain_name(flag)
    same = next((ours for ours in (*BY_SPELLING, *OWN_FLAGS) if plain_name(ours) == name), None)
    if same is not None or name in OPTION_BY_FOREIGN_NAME:
        return (same or OPTION_BY_FOREIGN_NAME[name],)
    known = {plain_name(ours): ours for ours in _known_flags()}
    same_sense = [other for other in known if other.startswith(_NEGATIONS) == name.startswith(_NEGATIONS)]
    nearest = get_close_matches(name, same_sense, n=1, cutoff=_NEAR)
    if nearest:
        return (known[nearest[0]],)
    begun = {*(ours for ours in OWN_FLAGS if plain_name(ours).startswith(name))}
    begun |= {one.spelling for ours, one in BY_SPELLING.items() if plain_name(ours).startswith(name)}
    return tuple(sorted(begun)) if len(name) >= _SHORTEST and len(begun) <= _MOST_MEANT else ()


def _known_flags() -> Iterable[str]:
    """Every flag that can be given, ours last, so that of two equal names ours is the one suggested."""
    for row in (row for table in TABLES for row in table.accepted):
        yield from (*row.switches, *row.valued, *row.lists)
    yield from (*_ALL_SYNONYMS, *_VALUED_SYNONYMS, *ZERO_BUBBLE_SWITCHES, *ZERO_BUBBLE_VALUED, *OWN_FLAGS, *BY_SPELLING)


def _keep_zero_bubble(flag: GivenFlag, verdict: Verdict) -> None:
    takes = 1 if flag.name in ZERO_BUBBLE_VALUED else 0
    if len(flag.values) < takes:
        verdict.problems.append(_without_value(flag))
        return
    verdict.problems += [stray_sentence(word, flag.name) for word in flag.values[takes:]]
    verdict.zero_bubble[flag.name] = flag.values[:takes]


def _judge_valued(flag: GivenFlag, verdict: Verdict) -> None:
    if not flag.values:
        verdict.problems.append(_without_value(flag))
        return
    verdict.problems += [stray_sentence(word, flag.name) for word in flag.values[1:]]
    verdict.settings.update(synonym_settings(flag))


def _without_value(flag: GivenFlag) -> str:
    return f"{flag.name} has no value after it; give one, or leave it out."


def _judge_other(flag: GivenFlag, verdict: Verdict, is_dense: bool) -> None:
    without_effect = next(filter(None, (table.reason_and_arity(flag.name) for table in TABLES)), None)
    if without_effect is not None:
        reason, arity = without_effect
        if arity == "1" and not flag.values:
            verdict.problems.append(_without_value(flag))
            return
        own_values = flag.values if arity == "*" else flag.values[: int(arity)]
        verdict.problems += [stray_sentence(word, flag.name) for word in flag.values[len(own_values) :]]
        verdict.lines.append(f"{' '.join((flag.name, *own_values))} is accepted without effect: {reason}.")
    elif _is_harmless(flag):
        verdict.lines.append(f"{flag.text} is accepted without effect: it asks for what is done anyway.")
    elif is_dense and any(table.needs_experts(flag.name) for table in TABLES):
        verdict.lines.append(f"{flag.text} is accepted without effect: --num-experts 1 is a dense model.")
    else:
        _refuse(flag, verdict)


def _is_harmless(flag: GivenFlag) -> bool:
    harmless = _ALL_HARMLESS.get(flag.name)
    return harmless is not None and bool(flag.values) and all(_is_same_value(one, harmless) for one in flag.values)


def _is_same_value(one: str, other: str) -> bool:
    """Whether two words are equal, as numbers if both are: 1 and 1.0, or 1e0."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _refuse(flag: GivenFlag, verdict: Verdict) -> None:
    instead = next(filter(None, (table.instead_of(flag.name) for table in TABLES)), None)
    if instead is not None:
        verdict.problems.append(f"{flag.text} is not supported: {instead}.")
        return
    advice = ADVICE_BY_FOREIGN_NAME.get(plain_name(flag.name))
    meant = () if advice else flags_meant(flag.name)
    verdict.meant.update(BY_SPELLING[one].name for one in meant if one in BY_SPELLING)
    hint = f"{advice}." if advice else _hint(meant)
    verdict.problems.append(f"{flag.text} is unknown; {hint}")


def _hint(meant: tuple[str, ...]) -> str:
    if not meant:
        return "--help lists all flags."
    *others, last = meant
    return f"did you mean {' or '.join([*([', '.join(others)] if others else []), last])}?"
