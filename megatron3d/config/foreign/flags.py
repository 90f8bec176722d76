"""The fate of words that are no option of ours: what they set, what is reported, and which are mistakes.

A flag of Megatron-LM or one of its forks has its fate in a table (see `megatron.py`). Any other word is unknown; the
hint at it comes from the names of other frameworks (`names.py`) or a near-identical spelling.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
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
}
# Spellings are suggested from here on: one letter of ten may differ, words may be missing in a long name.
_NEAR = 0.83
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


def judge(flags: Iterable[GivenFlag]) -> Verdict:
    """The fate of each flag, in order; synonyms that contradict each other win by their place in the table."""
    flags = tuple(flags)
    verdict = Verdict()
    is_dense = any(flag.name == "--num-experts" and _is_harmless(flag) for flag in flags)
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
    """A sentence for each flag whose value stands for options that are `given` another value."""
    for flag in flags:
        if flag.name not in _VALUED_SYNONYMS or not flag.values or _is_harmless(flag):
            continue
        key, more = _VALUED_SYNONYMS[flag.name]
        for one, value in ({key: flag.values[0]} | dict(more)).items():
            other = given.get(one)
            other = TOKENIZER_ALIASES.get(other, other) if isinstance(other, str) else other
            if other is not None and other != value:
                spelling = BY_KEY[one].spelling
                yield f"{flag.text} means {spelling} {value}, but {spelling} is {other}; give only one of them."


def option_meant(flag: str) -> str | None:
    """The flag of ours that an unknown flag was probably meant to be: by its name elsewhere, or a slip of spelling."""
    name = plain_name(flag)
    same = next((ours for ours in (*BY_SPELLING, *OWN_FLAGS) if plain_name(ours) == name), None)
    if same is not None or name in OPTION_BY_FOREIGN_NAME:
        return same or OPTION_BY_FOREIGN_NAME[name]
    known = {plain_name(ours): ours for ours in _known_flags()}
    same_sense = [other for other in known if other.startswith(_NEGATIONS) == name.startswith(_NEGATIONS)]
    nearest = get_close_matches(name, same_sense, n=1, cutoff=_NEAR)
    return known[nearest[0]] if nearest else None


def _known_flags() -> Iterable[str]:
    """Every flag that can be given, ours last, so that of two equal names ours is the one suggested."""
    for row in (row for table in TABLES for row in table.accepted):
        yield from (*row.switches, *row.valued, *row.lists)
    yield from (*_ALL_SYNONYMS, *_VALUED_SYNONYMS, *ZERO_BUBBLE_SWITCHES, *ZERO_BUBBLE_VALUED, *OWN_FLAGS, *BY_SPELLING)


def _keep_zero_bubble(flag: GivenFlag, verdict: Verdict) -> None:
    takes = 1 if flag.name in ZERO_BUBBLE_VALUED else 0
    if len(flag.values) < takes:
        verdict.problems.append(f"{flag.name} has no value after it; give one, or leave it out.")
        return
    verdict.problems += [stray_sentence(word, flag.name) for word in flag.values[takes:]]
    verdict.zero_bubble[flag.name] = flag.values[:takes]


def _judge_valued(flag: GivenFlag, verdict: Verdict) -> None:
    key, more = _VALUED_SYNONYMS[flag.name]
    if not flag.values:
        verdict.problems.append(f"{flag.name} has no value after it; give one, or leave it out.")
        return
    verdict.problems += [stray_sentence(word, flag.name) for word in flag.values[1:]]
    verdict.settings.update({key: flag.values[0], **more})


def _judge_other(flag: GivenFlag, verdict: Verdict, is_dense: bool) -> None:
    without_effect = next(filter(None, (table.reason_and_arity(flag.name) for table in TABLES)), None)
    if without_effect is not None:
        reason, arity = without_effect
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
    return bool(flag.values) and set(flag.values) == {_ALL_HARMLESS.get(flag.name)}


def _refuse(flag: GivenFlag, verdict: Verdict) -> None:
    instead = next(filter(None, (table.instead_of(flag.name) for table in TABLES)), None)
    name = plain_name(flag.name)
    # A name of another framework may begin like a family of Megatron-LM's flags: --block-size, and --block-data-path.
    is_elsewhere = name in OPTION_BY_FOREIGN_NAME or name in ADVICE_BY_FOREIGN_NAME
    if instead is not None and not is_elsewhere:
        verdict.problems.append(f"{flag.text} is not supported: {instead}.")
        return
    advice = ADVICE_BY_FOREIGN_NAME.get(name)
    meant = None if advice else option_meant(flag.name)
    if meant is not None and meant in BY_SPELLING:
        verdict.meant.add(BY_SPELLING[meant].name)
    hint = f"{advice}." if advice else f"did you mean {meant}?" if meant else "--help lists all flags."
    verdict.problems.append(f"{flag.text} is unknown; {hint}")
