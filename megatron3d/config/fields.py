"""How a field of a config dataclass says which command-line flag sets it.

A config is a frozen dataclass whose fields are made with `option` (a flag that takes a value), `switch` (a flag
that turns a default of False on) or `off_switch` (a flag that turns a default of True off). The command line is
built from these declarations in `cli.py`; nothing else knows how flags are spelled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Flag:
    """What the command line needs to know of one field.

    `spellings[0]` is Megatron-LM's present name and the one our messages use; the rest are older spellings that are
    still accepted. `kind` is "value", "on" (presence means True), "off" (presence means False) or "list".
    With `takes_code` a value may also name something in a user's own file, as `module:name` or `path/to/file.py:name`.
    `several` names the field that is set instead where more than one value follows.
    """

    spellings: tuple[str, ...]
    help: str
    kind: str = "value"
    unit: str = ""
    choices: tuple[Any, ...] = ()
    takes_code: bool = False
    several: str = ""


def option(
    default: Any,
    spelling: str,
    help: str,
    *,
    unit: str = "",
    choices: tuple[Any, ...] = (),
    also: tuple[str, ...] = (),
    takes_code: bool = False,
    several: str = "",
) -> Any:
    """A field set by a flag with a value, such as `--num-layers 24`."""
    flag = Flag((spelling, *also), help, "value", unit, choices, takes_code, several)
    return field(default=default, metadata={"flag": flag})


def options(spelling: str, help: str, *, also: tuple[str, ...] = ()) -> Any:
    """A field (a tuple of words) set by a flag with any number of values, such as `--data-path 0.7 A 0.3 B`."""
    return field(default=(), metadata={"flag": Flag((spelling, *also), help, "list")})


def switch(spelling: str, help: str, *, also: tuple[str, ...] = ()) -> Any:
    """A field that is False unless its flag is given."""
    return field(default=False, metadata={"flag": Flag((spelling, *also), help, "on")})


def off_switch(spelling: str, help: str, *, also: tuple[str, ...] = ()) -> Any:
    """A field that is True unless its flag is given, such as `--disable-bias-linear`."""
    return field(default=True, metadata={"flag": Flag((spelling, *also), help, "off")})
