"""The command line: flags built from the fields of the config dataclasses, in Megatron-LM's spelling.

`parse_args` layers what a user says: defaults < `--preset` < `--config FILE` < flags, and reports every word it cannot
use in one error. It does not judge whether values fit together; that is `check.py`, which needs the number of ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from megatron3d.config.checkpoint_args import with_checkpoint_args
from megatron3d.config.files import FileSettings, read_config_file
from megatron3d.config.megatron_flags import HARMLESS_VALUES, SYNONYMS, accepted, refused
from megatron3d.config.options import BY_NAME, BY_SPELLING, OPTIONS, SECTIONS, Option, build_run_config
from megatron3d.config.presets import PRESETS
from megatron3d.config.run import RunConfig
from megatron3d.errors import ConfigError

Foreign = tuple[str, tuple[str, ...]]

_METAVARS = {"int": "N", "float": "X", "str": "TEXT"}
_GROUP_TITLES = {
    "model": "model: what is computed",
    "parallel": "parallel: how the work is cut",
    "train": "train: how long, in which batches, and what is logged",
    "optim": "optim: how weights are updated, and in which precision",
    "data": "data: which tokens are read",
    "checkpoint": "checkpoint: what is saved and loaded",
}
_EPILOG = (
    "Values come from, in rising order: defaults, --preset, --config, flags, --use-checkpoint-args. Megatron-LM's "
    "flags without meaning here are accepted with one line each; those of features that are not here are refused with "
    "what to use instead. See docs/configuration.md."
)


def parse_args(
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    say: Callable[[str], None] | None = None,
    architecture: str = "gpt",
) -> RunConfig:
    """The run a command line asks for; `--help` prints and exits.

    `argv` is without the program's name. `say` takes the lines about Megatron-LM's flags that have no meaning here;
    by default they go to stderr (pass a function that keeps silent on all ranks but one). `architecture` is what the
    program trains: a preset, file or flag that names another is refused.

    Raises: ConfigError with every unknown, refused or malformed word of the command line and the config file;
    CheckpointError if `--use-checkpoint-args` finds no checkpoint to take options from.
    """
    say = _to_stderr if say is None else say
    problems: list[str] = []
    words = _without_empty_flags(_join_negative_numbers(argv), problems)
    namespace, leftover = _parser(program, description).parse_known_args(words)
    given = vars(namespace)
    foreign, stray = _group_by_flag(leftover)
    config_file = read_config_file(given["config"]) if given["config"] else FileSettings({}, None, (), ())
    settings: dict[tuple[str, str], Any] = {("model", "architecture"): architecture}
    settings.update(_preset_settings(given["preset"] or config_file.preset, problems))
    settings.update(config_file.settings)
    problems += config_file.problems
    settings.update(_synonym_settings(foreign))
    settings.update(_flag_settings(given, problems))
    problems += _review(foreign, stray, say)
    problems += [f"{given['config']}: {problem}" for problem in _review(config_file.foreign, (), say)]
    asked = settings["model", "architecture"]
    if asked != architecture:
        problems.append(
            f"{program} trains a {architecture.upper()}, but --preset, --config or --architecture asks for a "
            f"{asked.upper()}; use pretrain_{asked}.py."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return build_run_config(with_checkpoint_args(settings, say))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """argparse that raises our error instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError; argparse's own messages name the flag and its value."""
        raise ConfigError(f"{message[0].upper()}{message[1:]}; --help lists every flag and its value.")


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description=description,
        epilog=_EPILOG,
        allow_abbrev=False,
        usage=f"{program} [--preset NAME] [--config FILE] [flags]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=118),
    )
    parser.add_argument("--config", metavar="FILE", help="Options from a JSON or TOML file; flags override them.")
    names = ", ".join(PRESETS)
    parser.add_argument("--preset", metavar="NAME", help=f"The shape of a published model: {names}.")
    for section in SECTIONS:
        group = parser.add_argument_group(_GROUP_TITLES[section])
        for option in OPTIONS:
            if option.section == section:
                _add(group, option)
    return parser


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    """One flag. Values stay words here: `Option.convert` turns them into values, so that all problems are found."""
    flag = option.flag
    settings: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": _help(option)}
    if flag.kind in ("on", "off"):
        settings |= {"action": "store_const", "const": flag.kind == "on"}
    elif flag.kind == "list":
        settings |= {"nargs": "*", "metavar": "WORD"}
    else:
        settings |= {"metavar": _metavar(option)}
    group.add_argument(option.spelling, **settings)
    for older_spelling in flag.spellings[1:]:
        group.add_argument(older_spelling, **(settings | {"help": argparse.SUPPRESS}))


def _metavar(option: Option) -> str:
    choices = option.flag.choices
    return "{" + ",".join(str(choice) for choice in choices) + "}" if choices else _METAVARS[option.type_name]


def _help(option: Option) -> str:
    unit = f" [{option.flag.unit}]" if option.flag.unit else ""
    has_default = option.flag.kind == "value" and option.default not in (None, "")
    default = f" (default {option.default})" if has_default else ""
    return (option.flag.help + unit + default).replace("%", "%%")


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """`--lr -1e-5` as `--lr=-1e-5`: argparse would take -1e-5 for a flag and not name the value."""
    words: list[str] = []
    for word in argv:
        if (
            word.startswith("-")
            and not word.startswith("--")
            and words
            and words[-1].startswith("--")
            and _is_number(word)
        ):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _without_empty_flags(words: Sequence[str], problems: list[str]) -> list[str]:
    """The words without flags that miss their value, which argparse would stop at before the other problems."""
    kept: list[str] = []
    for word, following in zip(words, (*words[1:], "--")):
        option = BY_SPELLING.get(word)
        if option is not None and option.flag.kind == "value" and following.startswith("--"):
            problems.append(f"{word} has no value after it; give one ({_metavar(option)}): {option.flag.help}")
        else:
            kept.append(word)
    return kept


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _group_by_flag(leftover: Iterable[str]) -> tuple[tuple[Foreign, ...], tuple[str, ...]]:
    """The words argparse did not know, as flags with their values, and the words before any flag."""
    groups: list[tuple[str, list[str]]] = []
    stray: list[str] = []
    for word in leftover:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            stray.append(word)
    return tuple((flag, tuple(values)) for flag, values in groups), tuple(stray)


def _preset_settings(name: str | None, problems: list[str]) -> Mapping[tuple[str, str], Any]:
    if name is None:
        return {}
    if name not in PRESETS:
        problems.append(f"--preset {name} is not known; use one of: {', '.join(PRESETS)}.")
        return {}
    preset = PRESETS[name]
    architecture = preset.model_config().architecture
    return {("model", field): value for field, value in preset.model.items()} | {
        ("model", "architecture"): architecture
    }


def _synonym_settings(foreign: Iterable[Foreign]) -> Mapping[tuple[str, str], Any]:
    given = {flag for flag, _ in foreign}
    settings: dict[tuple[str, str], Any] = {}
    for flag, values in SYNONYMS.items():
        if flag in given:
            settings.update(values)
    return settings


def _flag_settings(given: Mapping[str, Any], problems: list[str]) -> Mapping[tuple[str, str], Any]:
    settings: dict[tuple[str, str], Any] = {}
    for name, value in given.items():
        if name in ("config", "preset"):
            continue
        option = BY_NAME[name]
        try:
            settings[option.key] = option.convert(value)
        except ValueError as error:
            problems.append(str(error))
    return settings


def _review(foreign: Iterable[Foreign], stray: Iterable[str], say: Callable[[str], None]) -> list[str]:
    """Problems with the words that are no option of ours; lines about those without meaning go to `say`."""
    problems = [_stray_sentence(word, "the first flag") for word in stray]
    for flag, values in foreign:
        without_effect = accepted(flag)
        if flag in SYNONYMS:
            problems += [_stray_sentence(word, flag) for word in values]
        elif without_effect is not None:
            reason, arity = without_effect
            own_values = values if arity == "*" else values[: int(arity)]
            problems += [_stray_sentence(word, flag) for word in values[len(own_values) :]]
            say(f"{' '.join((flag, *own_values))} is accepted without effect: {reason}.")
        elif HARMLESS_VALUES.get(flag) in values:
            say(f"{' '.join((flag, *values))} is accepted without effect: it asks for what is done anyway.")
        else:
            problems.append(_refusal(flag, values))
    return problems


def _stray_sentence(word: str, place: str) -> str:
    return f"'{word}' stands alone near {place} and belongs to no flag; put the flag it is meant for before it."


def _refusal(flag: str, values: tuple[str, ...]) -> str:
    instead = refused(flag)
    if instead is not None:
        return f"{' '.join((flag, *values))} is not supported: {instead}."
    nearest = get_close_matches(flag, [*BY_SPELLING, *SYNONYMS, "--config", "--preset", "--help"], n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "--help lists all flags."
    return f"{' '.join((flag, *values))} is unknown; {hint}"
