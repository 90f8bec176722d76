"""The switches of the zero-bubble fork of Megatron-LM that name a pipeline schedule together.

Its other flags are in `zero_bubble_flags.toml`.

Source: sail-sg/zero-bubble-pipeline-parallelism `megatron/core/zbpp_utils.py` and README ("Zero Bubble Command Line
Arguments").
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

# Flags that `zero_bubble_settings` reads together.
ZERO_BUBBLE_SWITCHES = ("--enable-zero-bubble", "--zero-bubble-v-schedule")
ZERO_BUBBLE_VALUED = ("--zero-bubble-max-pending-backward", "--zero-bubble-v-schedule-mem-setup")


def zero_bubble_settings(
    given: Mapping[str, tuple[str, ...]], num_stages: int, settings: MutableMapping[tuple[str, str], Any]
) -> tuple[list[str], list[str]]:
    """Set --pipeline-schedule by the zero-bubble fork's switches; returns problems and lines to show.

    The fork's V schedule is zb-v; without it, as many pending backwards as pipeline ranks are zb-h1 and twice as many
    zb-h2. Its default, auto, measures the memory that is left; that is answered with zb-h1, which needs what 1f1b does.

    Args:
        given: the fork's flags with their values.
        num_stages: pipeline ranks.
        settings: where to put the schedule.
    """
    setup = _last(given.get("--zero-bubble-v-schedule-mem-setup"), "zb")
    pending = _last(given.get("--zero-bubble-max-pending-backward"), "auto")
    if not any(flag in given for flag in ZERO_BUBBLE_SWITCHES):
        return [], [f"{flag} is accepted without effect: --enable-zero-bubble is not given." for flag in given]
    if "--zero-bubble-v-schedule" in given:
        if setup != "zb":
            return [
                f"--zero-bubble-v-schedule-mem-setup {setup} is not supported: its schedules of less memory are not in "
                "this version; use zb, or --pipeline-schedule zb-h1."
            ], []
        order = "zb-v"
    elif pending != "auto" and not pending.isdecimal():
        return [
            f"--zero-bubble-max-pending-backward {pending} is neither a whole number nor auto; use {num_stages} for "
            f"zb-h1 or {2 * num_stages} for zb-h2."
        ], []
    elif pending != "auto" and int(pending) < num_stages:
        return [
            f"--zero-bubble-max-pending-backward {pending} is below the {num_stages} pipeline ranks, which no schedule "
            f"here keeps to; use {num_stages} for zb-h1 or {2 * num_stages} for zb-h2."
        ], []
    else:
        order = "zb-h2" if pending != "auto" and int(pending) >= 2 * num_stages else "zb-h1"
    if num_stages == 1:
        return [], [f"{' '.join(given)}: no effect, as --pipeline-model-parallel-size is 1."]
    settings["parallel", "pipeline_schedule"] = order
    return [], [f"{' '.join(given)}: the schedule is --pipeline-schedule {order}."]


def _last(values: tuple[str, ...] | None, default: str) -> str:
    return values[-1] if values else default
