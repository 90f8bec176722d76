"""The inputs of recomputed layers that `--offload-activations` keeps off the device: how many, and when they are
still or already on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron3d.config.sections.train import TrainConfig
from megatron3d.nn.recompute import plan_recompute
from megatron3d.pipeline.plan import PipelinePlan
from megatron3d.pipeline.schedule import Action, Op, Step


class InputsWithoutMemory:
    """An `InputStore` of tensors without memory: on a CPU an input is there until it is written, which is waited for
    before the next is; on a GPU the allocator may use its memory again at once."""

    def __init__(self, *, on_cpu: bool) -> None:
        self._on_cpu = on_cpu
        self._leaving: Tensor | None = None

    def put(self, x: Tensor) -> _Stored:
        """Forget an input."""
        self._leaving = x.detach() if self._on_cpu else None
        return _Stored(x)

    def settle(self) -> None:
        """What was put last is written."""
        self._leaving = None


class _Stored:
    def __init__(self, x: Tensor) -> None:
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        self._coming: Tensor | None = None

    def start_fetch(self) -> None:
        if self._coming is None:
            self._coming = torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def take(self) -> Tensor:
        self.start_fetch()
        assert self._coming is not None, "what is fetched is coming"
        x, self._coming = self._coming, None
        return x


def most_stored_inputs(train: TrainConfig, plan: PipelinePlan, actions: Sequence[Action]) -> int:
    """How many hidden tensors a rank keeps off the device at most in a step, which consists of these actions."""
    now = most = 0
    for action in actions:
        if isinstance(action, Step) and action.op is not Op.W:
            inputs = _num_stored(train, len(plan.layers[action.stage]), is_first=action.stage == 0)
            now += inputs if action.op is Op.F else -inputs
            most = max(most, now)
    return most


def _num_stored(train: TrainConfig, num_layers: int, *, is_first: bool) -> int:
    """Inputs of groups of a stage that are recomputed, but for the one that came from another stage."""
    groups = plan_recompute(
        num_layers,
        granularity=train.recompute_granularity,
        method=train.recompute_method,
        layers_each=train.recompute_num_layers,
    )
    recomputed = [group for group in groups if group.recompute]
    return len(recomputed) - (0 if is_first or not recomputed else 1)
