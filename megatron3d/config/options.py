"""Every option of a run by its section, name and spellings: the one place that reads the fields' declarations.

The command line, config files, presets, checks and `run.json` all look options up here, so a field declared in a
section's dataclass is known to all of them at once. A field that a given section does not have is derived.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron3d.config.fields import Flag
from megatron3d.config.run import GivenRun
from megatron3d.config.sections.checkpoint import CheckpointConfig
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.data_efficiency import CurriculumConfig
from megatron3d.config.sections.lengths import LengthConfig
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.config.sections.optim import GivenOptim, OptimConfig
from megatron3d.config.sections.parallel import GivenParallel, ParallelConfig
from megatron3d.config.sections.train import GivenTrain, TrainConfig
from megatron3d.files.user_code import is_user_code

_MOST = 2**63 - 1  # of steps, samples and sizes, which travel in int64

# The sections as they are given: every field is an option.
GIVEN: Mapping[str, type] = MappingProxyType(
    {
        "model": GivenModel,
        "parallel": GivenParallel,
        "train": GivenTrain,
        "lengths": LengthConfig,
        "optim": GivenOptim,
        "data": DataConfig,
        "curriculum": CurriculumConfig,
        "checkpoint": CheckpointConfig,
    }
)
# The same resolved, as `run.json` stores them.
SECTIONS: Mapping[str, type] = MappingProxyType(
    {
        "model": ModelConfig,
        "parallel": ParallelConfig,
        "train": TrainConfig,
        "lengths": LengthConfig,
        "optim": OptimConfig,
        "data": DataConfig,
        "curriculum": CurriculumConfig,
        "checkpoint": CheckpointConfig,
    }
)

# What a run sets, before defaults: {(section, field): value}.
Settings = Mapping[tuple[str, str], Any]


@dataclasses.dataclass(frozen=True)
class Option:
    """One field that a user can set: where it lives, how it is spelled, and what values it takes."""

    section: str
    name: str
    type_name: str
    default: Any
    flag: Flag

    @property
    def key(self) -> tuple[str, str]:
        """Section and field name: how settings are indexed."""
        return self.section, self.name

    @property
    def spelling(self) -> str:
        """The flag our messages use."""
        return self.flag.spellings[0]

    def value_in(self, config: GivenRun) -> Any:
        """This option's value in a run."""
        return getattr(getattr(config, self.section), self.name)

    def allows(self, value: Any) -> bool:
        """Whether a value is one of the choices, where there are any, or names code of the user's, where it may."""
        choices, takes_code = self.flag.choices, self.flag.takes_code
        return not choices or value in choices or (takes_code and is_user_code(value))

    def convert(self, given: Any) -> Any:
        """The field's value from a word of the command line or a value of a config file.

        Raises: ValueError with a sentence for the user if it is not of the field's type or not one of its choices.
        """
        value = self._typed(given)
        if not self.allows(value):
            same = [choice for choice in self.flag.choices if str(choice).lower() == str(value).lower()]
            if len(same) == 1:  # such as `--normalization rmsnorm` of Megatron-DeepSpeed
                return same[0]
            names = ", ".join(str(choice) for choice in self.flag.choices)
            if self.flag.takes_code:
                own = value if str(value).endswith(".py") else "path/to/file.py"
                names += f", or {own}:NAME for one of your own"
            raise ValueError(f"{self.spelling} {given} is not one of its choices; use one of: {names}.")
        return value

    def _typed(self, given: Any) -> Any:
        if self.flag.kind == "list":
            words = given.split() if isinstance(given, str) else given
            if not isinstance(words, list | tuple) or not all(isinstance(word, str | int | float) for word in words):
                raise ValueError(f"{self.spelling} {given!r:.60} is not a list of words; write a list, or one string.")
            return tuple(str(word) for word in words)
        if self.type_name == "bool":
            if isinstance(given, bool):
                return given
            raise ValueError(f"{self.spelling} {given!r} is not true or false; in a config file write true or false.")
        if self.type_name == "str":
            if isinstance(given, bool) or not isinstance(given, str | int | float):
                raise ValueError(f"{self.spelling} {given!r:.60} is not a text; write a string.")
            return str(given)
        number = _number(given)
        if number is None:
            raise ValueError(f"{self.spelling} {given} is not a number; give a finite number such as 1 or 1e-5.")
        if self.type_name == "float":
            return float(number)
        if number != int(number):
            raise ValueError(f"{self.spelling} {given} is not a whole number; use {int(number)} or {int(number) + 1}.")
        if abs(number) > _MOST:
            raise ValueError(f"{self.spelling} {given} is too large for a count; use at most {_MOST}.")
        return int(number)


def _number(given: Any) -> int | float | None:
    """A finite number, exact if it is written as a whole number, or None."""
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        return None
    try:
        number = float(given)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    try:
        return int(given) if not isinstance(given, float) else given
    except ValueError:
        return number


def _declared_options() -> tuple[Option, ...]:
    return tuple(
        Option(section, field.name, str(field.type).removesuffix(" | None"), field.default, field.metadata["flag"])
        for section, config_class in GIVEN.items()
        for field in dataclasses.fields(config_class)
    )


OPTIONS: tuple[Option, ...] = _declared_options()
BY_KEY: Mapping[tuple[str, str], Option] = MappingProxyType({option.key: option for option in OPTIONS})
BY_NAME: Mapping[str, Option] = MappingProxyType({option.name: option for option in OPTIONS})
BY_SPELLING: Mapping[str, Option] = MappingProxyType(
    {spelling: option for option in OPTIONS for spelling in option.flag.spellings}
)
DERIVED_NAMES: frozenset[str] = frozenset(
    field.name
    for config_class in SECTIONS.values()
    for field in dataclasses.fields(config_class)
    if field.name not in BY_NAME
)


def given_run(settings: Settings) -> GivenRun:
    """A run with these settings and the defaults of everything else."""
    sections = {
        section: config_class(**{name: value for (where, name), value in settings.items() if where == section})
        for section, config_class in GIVEN.items()
    }
    return GivenRun(**sections)
