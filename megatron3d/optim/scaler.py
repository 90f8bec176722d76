"""Loss scaling for fp16: the number each loss is multiplied by so that small gradients do not vanish, as plain state.

A scaler holds no tensor and does no arithmetic on gradients: the step multiplies by `scale`, finds out with one
reduction over all ranks whether the gradients were finite, and says so with `update`. As every rank passes the same
answer, every rank has the same scale without communication.

Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740, section 3.2; the rules of growth and
hysteresis are those of Megatron-LM's DynamicGradScaler. Two deliberate differences: where its scalers skip every step
for ever, at the smallest scale or at a constant one, these end the run; and growth stops at 2**127, the largest power
of two in fp32, instead of reaching infinity, from which there is no way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.errors import CheckpointError, ConfigError, NumericsError

LARGEST_SCALE = 2.0**127  # the scale multiplies an fp32 loss


class LossScaler(Protocol):
    """What a training step asks of a scaler."""

    @property
    def scale(self) -> float:
        """The factor of the next step's loss."""
        ...

    def update(self, finite: bool) -> None:
        """Take in whether the gradients of the step, over all ranks, were finite."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores: a dict of numbers and words."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        ...


class ConstantScale:
    """A scale that never changes: 1 for fp32 and bf16, `--loss-scale` for fp16.

    With no smaller scale to go to, it counts as `DynamicScale` does at its smallest: non-finite steps, in a row or not,
    until `window` finite ones have come in a row; number `hysteresis` ends the run.
    """

    def __init__(self, scale: float, *, window: int = 1000, hysteresis: int = 2) -> None:
        """Raises: ConfigError if the scale is not above 0."""
        if not scale > 0:
            raise ConfigError(
                f"--loss-scale {scale} is not above 0; give a power of two such as 1024, or leave it out."
            )
        self._scale = float(scale)
        self._window, self._hysteresis = window, hysteresis
        self._finite_steps = 0
        self._overflows_left = hysteresis

    @property
    def scale(self) -> float:
        """The factor of every step's loss."""
        return self._scale

    def update(self, finite: bool) -> None:
        """Count.

        Raises: NumericsError if gradients were not finite too often: every further step could be skipped for ever.
        """
        self._finite_steps = self._finite_steps + 1 if finite else 0
        if self._finite_steps >= self._window:
            self._finite_steps, self._overflows_left = 0, self._hysteresis
        if finite:
            return
        self._overflows_left -= 1
        if self._overflows_left <= 0:
            raise NumericsError(
                f"The gradients were not finite in {self._hysteresis} steps (--hysteresis) at the fixed --loss-scale "
                f"{self._scale:g}, which cannot shrink: lower it or --lr, leave --loss-scale out for a scale that "
                "adapts, or train with --bf16."
            )

    def state(self) -> dict[str, Any]:
        """The counters; the value comes from the flags."""
        return {"kind": "constant", "finite_steps": self._finite_steps, "overflows_left": self._overflows_left}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the counters back; those of a dynamic scaler say nothing about this scale and are dropped, and a state
        without any starts them anew."""
        if state.get("kind") == "constant" and "overflows_left" in state:
            self._finite_steps = int(state["finite_steps"])
            self._overflows_left = int(state["overflows_left"])


class DynamicScale:
    """A scale that grows while gradients are finite and shrinks when they overflow.

    After `window` finite steps in a row it is multiplied by `growth`. Non-finite steps are counted, in a row or not,
    until the next growth; from number `hysteresis` on each one multiplies the scale by `backoff`, down to `min_scale`.
    """

    def __init__(
        self,
        initial: float,
        min_scale: float,
        *,
        window: int,
        hysteresis: int,
        growth: float = 2.0,
        backoff: float = 0.5,
    ) -> None:
        """Raises: ConfigError listing every option whose value cannot work."""
        problems = []
        if not 0 < min_scale <= initial <= LARGEST_SCALE:
            problems.append(
                f"--initial-loss-scale {initial:g} is not between --min-loss-scale {min_scale:g} (above 0) and "
                f"{LARGEST_SCALE:g}; choose it there."
            )
        if window < 1:
            problems.append(f"--loss-scale-window {window} is not at least 1 iteration; 1000 is usual.")
        if hysteresis < 1:
            problems.append(f"--hysteresis {hysteresis} is not at least 1 iteration; 2 is usual.")
        if problems:
            raise ConfigError("\n".join(problems))
        assert growth > 1 > backoff > 0, (growth, backoff)
        self._scale = float(initial)
        self._min_scale = float(min_scale)
        self._window = window
        self._hysteresis = hysteresis
        self._growth = growth
        self._backoff = backoff
        self._finite_steps = 0
        self._overflows_left = hysteresis

    @property
    def scale(self) -> float:
        """The factor of the next step's loss."""
        return self._scale

    def update(self, finite: bool) -> None:
        """Grow, shrink or count.

        Raises: NumericsError if gradients are not finite at the smallest scale: no smaller one can save the run.
        """
        if finite:
            self._count_finite_step()
        else:
            self._count_overflow()

    def state(self) -> dict[str, Any]:
        """Scale and counters; the limits come from the flags."""
        return {
            "kind": "dynamic",
            "scale": self._scale,
            "finite_steps": self._finite_steps,
            "overflows_left": self._overflows_left,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back scale and counters; the state of a fixed scale leaves the initial values of the flags.

        Raises: CheckpointError if the state lacks a value or its scale is outside the limits.
        """
        if state.get("kind") == "constant":
            return
        missing = {"scale", "finite_steps", "overflows_left"} - set(state)
        if missing:
            raise CheckpointError(
                f"The loss-scaler state of the checkpoint lacks {sorted(missing)}; it is damaged, load another step "
                "with --ckpt-step or give --no-load-optim."
            )
        if not 0 < state["scale"] <= LARGEST_SCALE:
            raise CheckpointError(
                f"The loss scale {state['scale']} of the checkpoint is not between 0 and {LARGEST_SCALE:g}; the "
                "checkpoint is damaged, load another step with --ckpt-step or give --no-load-optim."
            )
        self._scale = float(state["scale"])
        self._finite_steps = int(state["finite_steps"])
        self._overflows_left = int(state["overflows_left"])

    def _count_finite_step(self) -> None:
        """One more finite step in a row; at the end of the window the scale grows and the hysteresis starts again."""
        self._finite_steps += 1
        if self._finite_steps >= self._window:
            self._finite_steps = 0
            self._overflows_left = self._hysteresis
            self._scale = min(self._scale * self._growth, LARGEST_SCALE)

    def _count_overflow(self) -> None:
        """One more overflow; once the hysteresis is used up each one lowers the scale."""
        self._finite_steps = 0
        self._overflows_left -= 1
        if self._overflows_left > 0:
            return
        if self._scale <= self._min_scale:
            raise NumericsError(
                f"The gradients are not finite at --min-loss-scale {self._min_scale:g} either, so a smaller scale "
                "cannot help: lower --lr, look at the data of this step, or train with --bf16."
            )
        self._scale = max(self._scale * self._backoff, self._min_scale)


def build_scaler(optim: OptimConfig) -> LossScaler:
    """The scaler the flags ask for: dynamic for fp16 without `--loss-scale`, else constant.

    Raises: ConfigError if an option of it cannot work.
    """
    if optim.precision != "fp16":
        return ConstantScale(1.0)
    if optim.loss_scale is not None:
        return ConstantScale(optim.loss_scale, window=optim.loss_scale_window, hysteresis=optim.hysteresis)
    return DynamicScale(
        optim.initial_loss_scale,
        optim.min_loss_scale,
        window=optim.loss_scale_window,
        hysteresis=optim.hysteresis,
    )
