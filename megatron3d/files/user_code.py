"""What a user's own Python file offers, by `module:name` or `path/to/file.py:name`; to look is to run that file."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from zlib import crc32

from megatron3d.errors import ConfigError


def is_user_code(name: str) -> bool:
    """Whether the value of an option points into a user's file: names of the project's own have no colon."""
    return ":" in name


def located(name: str) -> str:
    """The name with the absolute path of its file, which means the same in every directory; a module's stays."""
    place, _, wanted = name.rpartition(":")
    return f"{os.path.abspath(place)}:{wanted}" if place.endswith(".py") else name


def without_folder(name: str) -> str:
    """The name without the folder of its file, which may differ between machines; a module's stays."""
    place, _, wanted = name.rpartition(":")
    return f"{Path(place).name}:{wanted}" if place.endswith(".py") else name


def code_digest(name: str) -> str:
    """The SHA-256 of the file behind the value of an option, without that of what the file imports.

    Raises: ConfigError if there is no such file, or it cannot be read.
    """
    place = name.rpartition(":")[0]
    path: str | None = place
    if not place.endswith(".py"):
        spec = util.find_spec(place)
        path = None if spec is None else spec.origin
    try:
        return hashlib.sha256(Path(path or "").read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path or place} cannot be read ({error.strerror}); name a file of Python code.") from error


def load_user_object(
    option: str, name: str, kind: str, fits: Callable[[object], bool], *, error: type[ConfigError] = ConfigError
) -> object:
    """The object behind the value of an option; a file is run once by a process.

    Args:
        option: the flag, for messages.
        name: its value.
        kind: what the object must be, for messages.
        fits: whether an object is that.
        error: raised where there is none.

    Raises:
        ConfigError: or the error asked for: the file or module cannot be loaded, or has no such object.
    """
    place, _, wanted = name.rpartition(":")
    if not place or not wanted:
        raise error(f"{option} {name!r} names no {kind}; write module:{kind} or path/to/file.py:{kind}.")
    load = _load_file if place.endswith(".py") else _load_module
    try:
        module = load(place)
    except ConfigError as problem:
        raise error(f"{option} {name}: {problem}") from problem.__cause__
    found = vars(module).get(wanted)
    if not fits(found):
        own = sorted(key for key, value in vars(module).items() if fits(value) and not key.startswith("_"))
        raise error(f"{option} {name}: {place} has no {kind} {wanted!r}; it has {', '.join(own) or 'none'}.")
    return found


def _load_file(place: str) -> ModuleType:
    """Run the user's file as a module of its own, which nothing else can import by accident."""
    path = Path(place)
    name = f"user_file_{path.stem}_{crc32(bytes(path.resolve())):08x}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(f"there is no file {path}{where}; give its path.")
    spec = util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path} ends in .py, which Python loads"
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without a guard for `__main__` exits
        del sys.modules[name]
        raise ConfigError(f"{path} cannot be loaded: {_shown(error)}; mend the file.") from error
    return module


def _load_module(place: str) -> ModuleType:
    """Import the user's module."""
    try:
        return import_module(place)
    except (Exception, SystemExit) as error:  # a script without a guard for `__main__` exits
        raise ConfigError(
            f"module {place!r} cannot be imported: {_shown(error)}; put its folder on PYTHONPATH, or give the path of "
            "the file, such as path/to/mine.py:name."
        ) from error


def _shown(error: BaseException) -> str:
    """An error of the user's code within a sentence, which has a full stop of its own."""
    return f"{type(error).__name__}: {error}".rstrip(".: ")
