"""Loads a user's own order from their own file: `--pipeline-schedule module:function` or `path/to/file.py:function`.

The function takes (num_ranks, num_microbatches, virtual) and returns a `Schedule`. What it returns is checked like any
other order; what goes wrong on the way is a sentence that names the option.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import cast

from megatron3d.errors import ScheduleError
from megatron3d.pipeline.schedule import Schedule

UserOrder = Callable[[int, int, int], Schedule]


def is_user_order(name: str) -> bool:
    """Whether the name of an order points into a user's file: named orders have no colon."""
    return ":" in name


def build_user_schedule(name: str, *, num_ranks: int, num_microbatches: int, virtual: int) -> Schedule:
    """What the user's function returns for these sizes; the caller checks the rows.

    Raises:
        ScheduleError: if the file, module or function is not there or fails, returns something else than a
            `Schedule`, or one of other sizes.
    """
    function = load_user_order(name)
    try:
        schedule = function(num_ranks, num_microbatches, virtual)
    except ScheduleError:
        raise
    except Exception as error:
        raise ScheduleError(
            f"--pipeline-schedule {name}: the function failed for {num_ranks} pipeline ranks, {num_microbatches} "
            f"microbatches and {virtual} stages per rank: {type(error).__name__}: {error}; it is called as "
            "function(num_ranks, num_microbatches, virtual)"
        ) from error
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"--pipeline-schedule {name} returned a {type(schedule).__name__}; return a "
            "megatron3d.pipeline.schedule.Schedule"
        )
    found = (schedule.num_ranks, schedule.num_microbatches, schedule.num_stages)
    wanted = (num_ranks, num_microbatches, num_ranks * virtual)
    if found != wanted:
        raise ScheduleError(
            f"--pipeline-schedule {name} returned {found[0]} ranks, {found[1]} microbatches and {found[2]} stages, but "
            f"this run has {wanted[0]}, {wanted[1]} and {wanted[2]} ({virtual} stages per rank); use the sizes given"
        )
    return schedule


def load_user_order(name: str) -> UserOrder:
    """The function behind `module:function` or `path/to/file.py:function`; loading runs the user's file.

    Raises:
        ScheduleError: if the file or module cannot be loaded, or has no such function.
    """
    place, _, function_name = name.rpartition(":")
    if not place or not function_name:
        raise ScheduleError(
            f"--pipeline-schedule {name!r} names no function; write module:function or path/to/file.py:function"
        )
    module = _load_file(name, Path(place)) if place.endswith(".py") else _load_module(name, place)
    function = vars(module).get(function_name)
    if not callable(function):
        own = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ScheduleError(
            f"--pipeline-schedule {name}: {place} has no function {function_name!r}; it has {', '.join(own) or 'none'}"
        )
    return cast(UserOrder, function)


def _load_file(name: str, path: Path) -> ModuleType:
    """Run the user's file as a module of its own, which nothing else can import by accident."""
    if not path.is_file():
        raise ScheduleError(f"--pipeline-schedule {name}: there is no file {path} in {Path.cwd()}; give its path")
    spec = util.spec_from_file_location(f"user_order_{path.stem}", path)
    assert spec is not None and spec.loader is not None, f"{path} ends in .py, which Python loads"
    module = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ScheduleError(
            f"--pipeline-schedule {name}: {path} cannot be loaded: {type(error).__name__}: {error}; mend the file"
        ) from error
    return module


def _load_module(name: str, place: str) -> ModuleType:
    """Import the user's module."""
    try:
        return import_module(place)
    except Exception as error:
        raise ScheduleError(
            f"--pipeline-schedule {name}: module {place!r} cannot be imported: {type(error).__name__}: {error}; put "
            "its folder on PYTHONPATH, or give the path of the file, such as orders/mine.py:function"
        ) from error
