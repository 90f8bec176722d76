"""Config files: the same options as the command line, written as JSON or TOML.

Keys are field names (`num_layers`) or flag names (`num-layers`, `--num-layers`), flat or inside tables named after
the sections (`[model]`). A null value means the default. `run.json` of an earlier run is such a file, so
`--config CHECKPOINT/run.json` repeats a run: values that were derived are derived again (`as_given.py`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron3d.config.as_given import edits, ranks_of_stored_run, with_given_values, without_derived
from megatron3d.config.command_line import GivenFlag
from megatron3d.config.options import BY_NAME, BY_SPELLING, DERIVED_NAMES, SECTIONS, Option, Settings
from megatron3d.config.serialize import AS_GIVEN
from megatron3d.errors import ConfigError
from megatron3d.files.json_text import kind_of, parse_object
from megatron3d.files.text import read_text


@dataclass(frozen=True)
class FileSettings:
    """What a config file holds: `settings` by (section, field), `preset` if it names one, and its mistakes.

    `foreign` are its keys that are no option of ours, as flags, with their values as words; a key that is false is
    left out, as a switch is. `unread` names options with a value that cannot be used; `is_read` is false where the
    file could not be read at all. `is_whole` is true of a `run.json` with its model, which leaves nothing to a preset.
    """

    settings: Mapping[tuple[str, str], Any]
    preset: str | None
    foreign: tuple[GivenFlag, ...]
    problems: tuple[str, ...]
    unread: frozenset[str] = frozenset()
    is_read: bool = True
    is_whole: bool = False


def read_config_file(path: str, flags: Settings) -> FileSettings:
    """The settings of a JSON or TOML file; `flags` are those that will override it.

    Raises: ConfigError if the file is missing, is neither `.json` nor `.toml`, cannot be parsed, or is a damaged
        `run.json`.
    """
    parsed = _parsed(Path(path))
    ranks = ranks_of_stored_run(parsed)
    if ranks is None and AS_GIVEN in parsed:
        raise ConfigError(
            f"--config {path} has {AS_GIVEN} of a run.json, but not its world_size in parallel, which is a whole "
            f"number; take {AS_GIVEN} out too, so that all values count as given."
        )
    if ranks is None:
        return _read(path, parsed)
    if AS_GIVEN not in parsed:
        found = _read(path, parsed)
        return replace(found, settings=without_derived(found.settings, ranks, flags), is_whole="model" in parsed)
    try:
        found = _read(path, with_given_values(parsed))
    except ConfigError as error:
        raise ConfigError(f"--config {path} is damaged: {error}.") from error
    problems = (*found.problems, *(f"{path}: {problem}" for problem in edits(parsed, found.settings, ranks)))
    return replace(found, problems=problems, is_whole="model" in parsed)


def _read(path: str, parsed: Mapping[str, Any]) -> FileSettings:
    settings: dict[tuple[str, str], Any] = {}
    foreign: list[GivenFlag] = []
    problems: list[str] = []
    unread: set[str] = set()
    preset = None
    keys: dict[str, str] = {}
    for key, value in _entries(parsed):
        name = key.lstrip("-").replace("-", "_")
        option = BY_NAME.get(name) or _option_by_spelling(name)
        meant = name if option is None else option.name
        wrong = _misplaced(key, name, value) if option is None else _doubled(keys.get(meant), key)
        keys[meant] = key
        if wrong is not None:
            problems.append(f"{path}: {wrong}")
        elif name == "preset":
            preset = value
        elif option is not None and value is not None:
            try:
                settings[option.key] = _value(option, name, value)
            except ValueError as error:
                problems.append(f"{path}: {error}")
                unread.add(option.name)
        elif option is None and name not in DERIVED_NAMES and value is not None and value is not False:
            foreign.append(GivenFlag(f"--{name.replace('_', '-')}", _words(value)))
    return FileSettings(settings, preset, tuple(foreign), tuple(problems), frozenset(unread))


def _misplaced(key: str, name: str, value: Any) -> str | None:
    """The problem with a key that is no option, where it is no flag of another program either."""
    if name == "preset":
        return None if isinstance(value, str) else f"{key} is {kind_of(value)}; name one, or leave the key out."
    if name in ("config", "deepspeed_config"):
        return f"{key} names another file, and no file is read for another; give --{name} in the command."
    if key in SECTIONS and isinstance(value, dict):
        return f"{key} is a section within a section; put its options beside the other sections."
    if key in SECTIONS:
        return f"{key} is {kind_of(value)}, but it names a section; put its options into an object."
    if isinstance(value, dict):
        return f"{key} holds options and is no section; sections are {', '.join(SECTIONS)}."
    return None


def _doubled(earlier: str | None, key: str) -> str | None:
    """The problem with an option that an earlier key of the file has set."""
    if earlier is None:
        return None
    if earlier == key:
        return f"{key} stands in two places of the file; leave one of them out."
    return f"{earlier} and {key} are the same option; leave one of them out."


def _parsed(path: Path) -> Mapping[str, Any]:
    if path.suffix not in (".json", ".toml"):
        raise ConfigError(f"--config {path} ends in '{path.suffix}'; give a file that ends in .json or .toml.")
    try:
        text = read_text(path)
        parsed = parse_object(text, unique_keys=True) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            f"--config {path} cannot be read ({error.strerror}); give the path of an existing file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--config {path} is not valid {path.suffix[1:].upper()} ({error}); correct it there."
        ) from error
    return parsed


def _entries(parsed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All keys with their values, sections opened."""
    for key, value in parsed.items():
        if isinstance(value, dict) and key in SECTIONS:
            yield from value.items()
        else:
            yield key, value


def _option_by_spelling(name: str) -> Option | None:
    for spelling, option in BY_SPELLING.items():
        if spelling.lstrip("-").replace("-", "_") == name:
            return option
    return None


def _value(option: Option, name: str, value: Any) -> Any:
    """The field's value; a flag such as `disable-bias-linear: true` turns its field off."""
    converted = option.convert(value)
    written_as_off_switch = option.flag.kind == "off" and name != option.name
    return not converted if written_as_off_switch else converted


def _words(value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ()
    return tuple(str(word) for word in value) if isinstance(value, list) else (str(value),)
