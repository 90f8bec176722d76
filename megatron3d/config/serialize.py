"""A run as JSON, saved as `run.json` beside each checkpoint, and as a table for people.

Every section holds the values that the run used. Beside the sections stands `as_given`, the values of
`DraftRun.as_given`, by which a config file knows which of them to derive again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from megatron3d.config.architectures import ARCHITECTURES
from megatron3d.config.derive import complete, derive_model
from megatron3d.config.field_types import wanted_type
from megatron3d.config.options import BY_KEY, GIVEN, SECTIONS, Settings
from megatron3d.config.run import DraftRun, RunConfig
from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.config.sections.train import DraftTrain
from megatron3d.errors import ConfigError
from megatron3d.files.user_code import is_user_code, located, without_folder

# What is read of each section before it is known to be complete.
_STORED: Mapping[str, type] = MappingProxyType({**GIVEN, "parallel": ParallelConfig, "train": DraftTrain})


AS_GIVEN = "as_given"  # the key beside the sections
_SHOWN_LEVELS = 3  # of batch sizes and lengths, at each end


def to_dict(config: DraftRun) -> dict[str, dict[str, Any]]:
    """The run as nested dicts of plain JSON values, every field of every section; `from_dict` takes it back exactly.

    A draft is what is stored beside weights that are imported: of no run, and so without a learning rate.
    """
    as_given: dict[str, dict[str, Any]] = {}
    for (section, name), value in config.as_given.items():
        as_given.setdefault(section, {})[name] = _plain(value)
    return {section: _section_to_dict(getattr(config, section)) for section in SECTIONS} | {AS_GIVEN: as_given}


def from_dict(stored: Mapping[str, Any], *, architecture: str | None = None) -> RunConfig:
    """The run that `to_dict` gave. Fields that the stored run does not know yet take their defaults.

    Weights that are imported were stored without a learning rate; here it is 0. `architecture` is the one that the user
    names: an architecture in a file of theirs is code, which is not run because a stored run says so. The run has it by
    the name of the command, wherever the file lay when it was stored.

    Raises: ConfigError naming sections or fields that do not exist, that are of another type than they should be, or
        without which there is no run; or an architecture that the user has not named.
    """
    unknown = [section for section in stored if section not in (*SECTIONS, AS_GIVEN)]
    if unknown:
        raise ConfigError(f"The stored run has the unknown section {unknown[0]}; sections are {', '.join(SECTIONS)}.")
    draft = DraftRun(
        **{section: _section_from_dict(section, stored.get(section, {})) for section in SECTIONS},
        as_given=_as_given_from_dict(stored.get(AS_GIVEN, {})),
    )
    draft = dataclasses.replace(draft, model=_with_named_code(draft.model, architecture))
    optim = draft.optim if draft.optim.lr is not None else dataclasses.replace(draft.optim, lr=0.0)
    try:
        return complete(dataclasses.replace(draft, model=_filled(draft.model), optim=optim))
    except ConfigError as error:
        raise ConfigError(f"The stored run is damaged or written by another program: {error}") from error


def other_architecture(stored: Mapping[str, Any], wanted: str) -> str | None:
    """The architecture of a stored run if it is one of the project's, and not the one that is wanted; runs no code."""
    model = stored.get("model")
    found = model.get("architecture", "gpt") if isinstance(model, Mapping) else wanted
    return found if found != wanted and found in tuple(ARCHITECTURES) else None


def to_json(config: RunConfig) -> str:
    """The text of `run.json`; Raises: ValueError for a number that JSON cannot hold, such as infinity."""
    return json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"


def as_table(config: RunConfig) -> str:
    """Lines of option, value and unit by section: what differs from the defaults, whether given or derived.

    Values without a flag, such as the data-parallel size, always stand here, and so does the precision.
    """
    lines: list[str] = []
    for section in SECTIONS:
        rows = list(_rows(section, getattr(config, section)))
        if section == "optim":
            rows.append(("precision", config.optim.precision))
        if not rows:
            continue
        lines.append(section)
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join(lines)


def _section_to_dict(section_config: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(section_config, field.name)) for field in dataclasses.fields(section_config)}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _filled(model: GivenModel) -> GivenModel:
    """The model with what follows where nothing is stored: runs of earlier versions and imports may lack it."""
    derived = vars(derive_model(model))
    return dataclasses.replace(model, **{name: derived[name] for name, value in vars(model).items() if value is None})


def _with_named_code(model: GivenModel, named: str | None) -> GivenModel:
    """The stored model with its architecture as the command names it, where that is code of the user's.

    Raises: ConfigError if the command names another one than is stored.
    """
    own = model.architecture
    if named is None or not is_user_code(named):
        if is_user_code(own):
            raise ConfigError(
                f"The stored run has the architecture {own}, which is code that is run only where the command names "
                f"it; read it, and give --architecture {own}, which pretrain_gpt.py, tools/generate_text.py and "
                "hf-export take."
            )
        if named in (None, own):
            return model
    if without_folder(own) != without_folder(named):
        remedy = f"give --architecture {own}, once you have read it" if is_user_code(own) else "leave it out"
        raise ConfigError(
            f"The stored run has the architecture {own}, but the command names --architecture {named}; {remedy}, or "
            "name another checkpoint."
        )
    return dataclasses.replace(model, architecture=located(named))


def _section_from_dict(section: str, values: Any) -> Any:
    """The section as far as it is stored."""
    return _STORED[section](**_stored_values(section, values, _STORED[section]))


def _as_given_from_dict(stored: Any) -> Settings:
    """`DraftRun.as_given`; a run of earlier versions has none."""
    if not isinstance(stored, Mapping) or not stored.keys() <= GIVEN.keys():
        raise ConfigError(f"{AS_GIVEN} of the stored run is {stored!r:.60}, not an object of sections.")
    return {
        (section, name): value
        for section, values in stored.items()
        for name, value in _stored_values(section, values, GIVEN[section]).items()
    }


def _stored_values(section: str, values: Any, config_class: type) -> dict[str, Any]:
    """The stored fields of a section, each of its type."""
    names = {field.name for field in dataclasses.fields(config_class)}
    if not isinstance(values, Mapping):
        raise ConfigError(f"The section {section} of the stored run is a {type(values).__name__}, not an object.")
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ConfigError(
            f"The stored run has the unknown field {section}.{unknown[0]}; it comes from another version of "
            "megatron3d. Take the field out of run.json, or use that version."
        )
    frozen = {name: _frozen(value) for name, value in values.items()}
    wanted = {f.name: wanted_type(f, frozen[f.name]) for f in dataclasses.fields(config_class) if f.name in frozen}
    if wrong := [f"{section}.{name} is {frozen[name]!r:.60}, not {kind}" for name, kind in wanted.items() if kind]:
        raise ConfigError(f"The stored run is damaged or written by another program: {'; '.join(wrong)}.")
    return frozen


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _rows(section: str, section_config: Any) -> Iterator[tuple[str, str]]:
    """(name, value) of each field to show."""
    for field in dataclasses.fields(section_config):
        value = getattr(section_config, field.name)
        option = BY_KEY.get((section, field.name))
        if option is None and value != () and value is not False:
            yield field.name, _shown_levels(value) if isinstance(value, tuple) else str(value)
        elif option is not None and value != option.default:
            unit = f" {option.flag.unit}" if option.flag.unit else ""
            yield field.name, _shown(value) + unit


def _shown_levels(levels: tuple[Any, ...]) -> str:
    """The first and last of many."""
    if len(levels) <= 2 * _SHOWN_LEVELS:
        return str(levels)
    ends = (*levels[:_SHOWN_LEVELS], "...", *levels[-_SHOWN_LEVELS:])
    return f"{', '.join(map(str, ends))} ({len(levels)} levels)"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
