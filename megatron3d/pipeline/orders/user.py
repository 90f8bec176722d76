"""Loads a user's own order from their own file: `--pipeline-schedule module:function` or `path/to/file.py:function`.

The function takes (num_ranks, num_microbatches, virtual) and returns a `Schedule`. What it returns is checked like any
other order; what goes wrong on the way is a sentence that names the option.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from megatron3d.errors import ScheduleError
from megatron3d.files.user_code import load_user_object
from megatron3d.pipeline.schedule import Schedule

UserOrder = Callable[[int, int, int], Schedule]


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
    found = load_user_object("--pipeline-schedule", name, "function", callable, error=ScheduleError)
    return cast(UserOrder, found)
