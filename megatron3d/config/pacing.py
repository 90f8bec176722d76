"""Pacing of a curriculum: how a bound rises with the steps of a run, from the minimum to the maximum.

The bound limits a difficulty (`data/curriculum`) or the length of the sequences; this file knows of neither. Steps are
counted from 1, so that step t is the t-th update of the weights, which is how DeepSpeed counts them.

    fixed_linear, fixed_root   floor((t / T)^(1 / r) x (maximum - minimum) + minimum), rounded down to a multiple of the
                               difficulty step d; at least the first multiple of d from the minimum on, at most the
                               maximum. Linear is r = 1.
    fixed_discrete             a difficulty for each range of steps
    module:function            one of the user's own, a function of t

Source: DeepSpeed, `deepspeed/runtime/data_pipeline/curriculum_scheduler.py`, whose names and formulas these are. A
difficulty step that is no whole number, which DeepSpeed's rounding makes useless, is a multiple of d here as well.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Protocol, cast

from megatron3d.errors import ConfigError
from megatron3d.files.user_code import is_user_code, load_user_object

PACINGS = ("fixed_linear", "fixed_root", "fixed_discrete")
LARGEST_STEP = 10**8  # steps of a curriculum; its bounds are computed one by one at the start
_ROUNDING = 1e-9  # of a quotient by a fractional step, such as 0.3 / 0.1


class Pacing(Protocol):
    """A bound for each step."""

    @property
    def num_steps(self) -> int:
        """The step from which on the bound stays as it is."""
        ...

    def bound(self, step: int) -> float:
        """The bound at `step`, counted from 1."""
        ...


@dataclass(frozen=True)
class PacingOptions:
    """What the options say of one pacing; None where an option was not given.

    Attributes:
        kind: one of PACINGS, or `module:function`.
        minimum, maximum: the bound at the beginning and at the end, of a linear or root pacing.
        total_steps: T, after which the maximum holds; of the user's own function, the last step it is asked for.
        difficulty_step: d.
        root_degree: r.
        difficulties, last_steps: of a discrete pacing; the last difficulty has no last step.
    """

    kind: str
    minimum: float | None = None
    maximum: float | None = None
    total_steps: int | None = None
    difficulty_step: float = 1
    root_degree: int = 2
    difficulties: tuple[float, ...] = ()
    last_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class RootPacing:
    """The bound rises with the r-th root of the steps done; r = 1 is linear."""

    minimum: float
    maximum: float
    total_steps: int
    difficulty_step: float
    root_degree: int

    @property
    def num_steps(self) -> int:
        """T, or a little more where the maximum is no multiple of d: the formula reaches it by the next multiple."""
        if self.bound(self.total_steps) >= self.maximum:
            return self.total_steps
        share = (self._multiple_from(self.maximum) - self.minimum) / (self.maximum - self.minimum)
        return math.ceil(self.total_steps * share**self.root_degree) + 1

    def bound(self, step: int) -> float:
        """The formula above."""
        share = (step / self.total_steps) ** (1.0 / self.root_degree)
        wanted = share * (self.maximum - self.minimum) + self.minimum
        size = self.difficulty_step
        if float(size).is_integer():
            floored = math.floor(wanted)
            rounded = float(floored - floored % int(size))
        else:
            rounded = math.floor(wanted / size + _ROUNDING) * size
        return float(min(max(rounded, self._multiple_from(self.minimum)), self.maximum))

    def _multiple_from(self, value: float) -> float:
        """The first multiple of d at or above a value."""
        return math.ceil(value / self.difficulty_step - _ROUNDING) * self.difficulty_step


@dataclass(frozen=True)
class DiscretePacing:
    """`difficulties[i]` holds until `last_steps[i]`, and the last of them for ever after."""

    difficulties: tuple[float, ...]
    last_steps: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        """The step after the last of `last_steps`."""
        return self.last_steps[-1] + 1

    def bound(self, step: int) -> float:
        """The difficulty of the first range that has not ended before `step`."""
        return next((d for d, last in zip(self.difficulties, self.last_steps) if step <= last), self.difficulties[-1])


@dataclass(frozen=True)
class OwnPacing:
    """A function of the user's; what it says of step `num_steps` holds for ever after."""

    name: str
    function: Callable[[int], float]
    num_steps: int

    def bound(self, step: int) -> float:
        """What the function says. Raises: ConfigError if it fails or gives no finite number."""
        step = min(step, self.num_steps)
        try:
            found = float(self.function(step))
        except Exception as error:
            raise ConfigError(f"{self.name} failed at step {step}: {error}; mend the function.") from error
        if not math.isfinite(found):
            raise ConfigError(f"{self.name} gave {found} at step {step}; it must give a finite number.")
        return found


def build_pacing(options: PacingOptions, prefix: str = "--curriculum") -> Pacing:
    """The pacing that the options describe; the flags in messages begin with `prefix`.

    Raises: ConfigError with all sentences of `pacing_problems`, or if the user's own function cannot be loaded.
    """
    if problems := list(pacing_problems(options, prefix)):
        raise ConfigError("\n".join(problems))
    if is_user_code(options.kind):
        function = load_user_object(f"{prefix}-pacing", options.kind, "function", callable)
        assert options.total_steps is not None, f"{options.kind} passed the checks without steps"
        return OwnPacing(options.kind, cast(Callable[[int], float], function), options.total_steps)
    if options.kind == "fixed_discrete":
        return DiscretePacing(options.difficulties, options.last_steps)
    minimum, maximum, steps = options.minimum, options.maximum, options.total_steps
    assert minimum is not None and maximum is not None and steps is not None, f"{options} passed the checks"
    degree = options.root_degree if options.kind == "fixed_root" else 1
    return RootPacing(minimum, maximum, steps, options.difficulty_step, degree)


def plateaus(pacing: Pacing) -> tuple[tuple[int, float], ...]:
    """(first step, bound) of each range of steps with one bound, from step 1 on; the last goes on for ever.

    Raises: ConfigError as `OwnPacing.bound` does.
    """
    bounds = ((step, pacing.bound(step)) for step in _steps_to_ask(pacing))
    return tuple(next(same) for _, same in groupby(bounds, key=lambda pair: pair[1]))


def _steps_to_ask(pacing: Pacing) -> Iterator[int]:
    """Steps among which are all at which the bound changes: not every one, of which there may be very many."""
    if isinstance(pacing, DiscretePacing):
        yield from (1, *(last + 1 for last in pacing.last_steps))
    elif isinstance(pacing, RootPacing):
        step, steps = 1, range(pacing.num_steps + 1)
        while step <= pacing.num_steps:
            yield step
            step = bisect_right(steps, pacing.bound(step), lo=step, key=pacing.bound)
    else:
        yield from range(1, pacing.num_steps + 1)


def pacing_problems(options: PacingOptions, prefix: str = "--curriculum") -> Iterator[str]:
    """A sentence for each reason why the options describe no pacing; the flags begin with `prefix`."""
    if options.kind not in PACINGS and not is_user_code(options.kind):
        yield (
            f"{prefix}-pacing {options.kind} is not known; use one of {', '.join(PACINGS)}, or "
            "path/to/file.py:FUNCTION for one of your own."
        )
    elif options.kind == "fixed_discrete":
        yield from _discrete_problems(options, prefix)
    else:
        yield from _steps_problems(options, prefix)
        if not is_user_code(options.kind):
            yield from _range_problems(options, prefix)


def _steps_problems(options: PacingOptions, prefix: str) -> Iterator[str]:
    steps = options.total_steps
    if steps is None:
        yield f"{prefix}-steps is missing, by which {prefix}-pacing {options.kind} reaches its end; give it."
    elif not 1 <= steps <= LARGEST_STEP:
        yield f"{prefix}-steps {steps} is outside its range; it must be from 1 to {LARGEST_STEP}."


def _range_problems(options: PacingOptions, prefix: str) -> Iterator[str]:
    low, high, size = options.minimum, options.maximum, options.difficulty_step
    for name, value in (("min", low), ("max", high)):
        if value is None or not math.isfinite(value):
            what = "is missing" if value is None else f"{value} is not finite"
            yield f"{prefix}-{name}-difficulty {what}; {prefix}-pacing {options.kind} needs a number there."
    if not (math.isfinite(size) and size > 0):
        yield f"{prefix}-difficulty-step {size:g} is outside its range; it must be above 0."
        return
    if options.root_degree < 1:
        yield f"{prefix}-root-degree {options.root_degree} is outside its range; it must be at least 1."
    if low is None or high is None:
        return
    if low > high:
        yield f"{prefix}-min-difficulty {low:g} is above {prefix}-max-difficulty {high:g}; exchange them."
    elif low < high and size > high - low:
        yield (
            f"{prefix}-difficulty-step {size:g} is larger than the whole range from {low:g} to {high:g}; use at most "
            f"{high - low:g}."
        )


def _discrete_problems(options: PacingOptions, prefix: str) -> Iterator[str]:
    difficulties, last_steps = options.difficulties, options.last_steps
    if not last_steps or len(difficulties) != len(last_steps) + 1:
        yield (
            f"{prefix}-pacing fixed_discrete needs one step fewer in {prefix}-last-steps (given: "
            f"{_listed(last_steps)}) than difficulties in {prefix}-difficulties (given: {_listed(difficulties)}), "
            "since the last difficulty has no end; write them like 1,2,3 and 100,200."
        )
    if (
        any(later <= earlier for earlier, later in pairwise((0, *last_steps)))
        or max(last_steps, default=0) > LARGEST_STEP
    ):
        yield (
            f"{prefix}-last-steps {_listed(last_steps)} must rise from step to step, from 1 on and up to "
            f"{LARGEST_STEP}; correct them."
        )
    if not all(map(math.isfinite, difficulties)):
        yield f"{prefix}-difficulties {_listed(difficulties)} has a number that is not finite; correct it."


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers) or "none"
