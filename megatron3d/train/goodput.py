"""Goodput: which part of the time of a run made training progress that was kept.

    goodput = seconds of the steps that the weights are made of / seconds of wall time of the run's processes

Wall time is all of it since each process began: start-up, saves, evaluations, and what a process did after its last
checkpoint before it was lost. Time in which no process ran does not count. A checkpoint holds what was spent until then
(`time.json`); what a lost process spent after it is known from its metrics file, or else from its exit status.

Source: Google's ML Goodput Measurement (github.com/AI-Hypercomputer/ml-goodput-measurement), "the proportion of usage
time spent making productive, preserved training progress"; it takes the first step after a start for start-up, which
counts as a step here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeGuard

from megatron3d.files.fields import Fields
from megatron3d.train.progress import format_duration

Kind = Literal["steps_s", "saves_s", "evaluations_s"]


@dataclass(frozen=True)
class TimeSpent:
    """Seconds of a run, over all its processes: `wall_s` of everything, of which the others are known parts.

    `lost_s` and `lost_steps` are of processes that ended without a save: from their last checkpoint on.
    """

    wall_s: float = 0.0
    steps_s: float = 0.0
    saves_s: float = 0.0
    evaluations_s: float = 0.0
    lost_s: float = 0.0
    lost_steps: int = 0

    @property
    def goodput(self) -> float:
        """The part of the wall time that made the steps which counted, 0 to 1."""
        return self.steps_s / self.wall_s if self.wall_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> TimeSpent:
        """Raises: ValueError if it is not what `to_json` gives."""
        body = Fields(value, "time.json")
        found = {one.name: body.get(one.name) for one in fields(cls)}
        wrong = [name for name, seconds in found.items() if not _is_number(seconds)]
        if wrong:
            raise ValueError(f"time.json has {wrong[0]} {found[wrong[0]]!r:.40}, which is no number from 0 up")
        return cls(**found | {"lost_steps": body.integer("lost_steps")})

    def summary(self) -> str:
        """A clause for the log: goodput, and where the wall time went."""
        rest_s = max(0.0, self.wall_s - self.steps_s - self.saves_s - self.evaluations_s - self.lost_s)
        parts = {"steps": self.steps_s, "saves": self.saves_s, "evaluations": self.evaluations_s}
        if self.lost_steps:
            parts[f"{self.lost_steps} lost step{'s' * (self.lost_steps > 1)}"] = self.lost_s
        parts["start-up and the rest"] = rest_s
        shown = ", ".join(f"{name} {_shown(seconds)}" for name, seconds in parts.items())
        return f"goodput {100 * self.goodput:.1f} % of {_shown(self.wall_s)}: {shown}"


class Goodput:
    """Adds up the time of this process on top of that of those before it."""

    def __init__(self, before: TimeSpent, *, started_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`started_s` is when this process began, by `clock`."""
        self._spent, self._clock = before, clock
        self._started_s = started_s - before.wall_s

    def add(self, kind: Kind, seconds: float) -> None:
        """Count seconds that have passed."""
        self._spent = replace(self._spent, **{kind: getattr(self._spent, kind) + seconds})

    def spent(self) -> TimeSpent:
        """The time of the run until now."""
        return replace(self._spent, wall_s=self._clock() - self._started_s)


def spent_when_resuming(
    before: TimeSpent, step: int, records: Iterable[Mapping[str, Any]], *, ended_after: int | None = None
) -> TimeSpent:
    """What a run has spent when it resumes after `step`: `before`, by its checkpoint, and what was lost since.

    Args:
        before: until the checkpoint, which does not know how long its own save took.
        step: of the checkpoint.
        records: of the metrics file of the run before, not yet cut back; none if there is no file.
        ended_after: the last step of the run before by its exit status, for a run without a metrics file. A lost step
            then counts with the mean time of the others.
    """
    known = list(records)
    since = [r for r in known if _number(r, "step") > step or _number(r, "from_step", -1) >= step]
    lost_now = len({r["step"] for r in since if "loss" in r})
    saves = [r for r in known if r.get("step") == step and "save_s" in r]
    save_s = _number(saves[-1], "save_s") if saves else 0.0
    wall_s = max([before.wall_s, *(_number(r, "wall_s") for r in (*since, *saves))])
    if not known and ended_after is not None and ended_after > step:
        lost_now = ended_after - step
        wall_s += lost_now * before.steps_s / step
    return replace(
        before,
        wall_s=wall_s,
        saves_s=before.saves_s + save_s,
        lost_s=before.lost_s + max(0.0, wall_s - before.wall_s - save_s),
        lost_steps=lost_now + max([before.lost_steps, *(int(_number(r, "lost_steps")) for r in since)]),
    )


def _number(record: Mapping[str, Any], name: str, otherwise: float = 0.0) -> float:
    """A number of a record that a user may have edited."""
    value = record.get(name)
    return value if _is_number(value) else otherwise


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _shown(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"
