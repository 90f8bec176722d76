"""FlatOptimizer: the base of this project's own optimizers over flat tensors.

Parameters are long one-dimensional fp32 tensors, and so is every tensor of their state, which exists from the start so
that a checkpoint can be loaded into it. Parameters without a gradient are left alone: a step may concern one
unit of the model. Gradients are used up: an optimizer may keep its update in them.

A group's "grad_scale" is what its gradients are multiplied with first, as clipping and a loss scale ask for. Where the
layers compute with a copy of a parameter in another dtype, the optimizer may be given it, and brings it up to date.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from megatron3d_kernels.adam import CHUNK_CPU, CHUNK_DEVICE
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that is never traced by torch.compile.

    torch keeps `add_param_group` out of what it compiles by a wrapper that imports the compiler at its first call,
    which takes most of a second; here the function itself is called.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does it."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)


class FlatOptimizer(EagerOptimizer):
    """Parameters in groups with "lr", "weight_decay" and "decays"; a step counter for each parameter.

    `config` has the coefficients; a subclass says what state it keeps and how it updates.
    """

    scales_gradients: ClassVar[bool] = False
    """Whether `update` multiplies gradients by their scale as it reads them; else they come to it multiplied."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self.config = config
        self.copies: Mapping[nn.Parameter, Tensor] = {}
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "grad_scale": 1.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                # The counter stays on the CPU, where reading it waits for nothing.
                self.state[parameter].update(self.new_state(parameter), step=torch.zeros(()))

    @abstractmethod
    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Zeros for the state of one parameter, by name: one-dimensional tensors on its device."""

    @abstractmethod
    def update(self, updates: Sequence[ParameterUpdate]) -> None:
        """Update the parameters that are due, which may be none; all ranks call it together."""

    def write_copies(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """From now on bring these copies up to date with their parameters at every step."""
        self.copies = copies

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient; a closure is not taken."""
        assert closure is None, f"{type(self).__name__} evaluates no closure"
        updates = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] += 1
                    updates.append(ParameterUpdate(parameter, group, state))
        if not self.scales_gradients:
            for one in updates:
                if one.grad_scale != 1.0:
                    one.grad.mul_(one.grad_scale)
        self.update(updates)
        self.publish(updates)

    def publish(self, updates: Sequence[ParameterUpdate]) -> None:
        """Bring the copies of updated parameters up to date."""
        for one in updates:
            if one.parameter in self.copies:
                self.copies[one.parameter].copy_(one.value)


class ParameterUpdate:
    """A parameter to be updated: its values, gradient, state, rates, scale of the gradient, and the number of the
    update from 1."""

    def __init__(self, parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        assert parameter.grad is not None, "a parameter without gradient is not due"
        self.parameter, self.value, self.grad, self.state = parameter, parameter.detach(), parameter.grad, state
        self.lr, self.weight_decay = float(group["lr"]), float(group["weight_decay"])
        self.grad_scale, self.count = float(group["grad_scale"]), int(state["step"])


def chunks(tensor: Tensor) -> Iterator[slice]:
    """Ranges that cover a flat tensor, each small enough for elementwise passes to stay in the cache."""
    size = CHUNK_CPU if tensor.device.type == "cpu" else CHUNK_DEVICE
    return (slice(start, min(start + size, tensor.numel())) for start in range(0, tensor.numel(), size))


def by_rates(updates: Sequence[ParameterUpdate]) -> list[list[ParameterUpdate]]:
    """Updates in groups with the same rates and number, which torch's fused kernels take in one call."""
    groups: dict[tuple[float, float, float, int], list[ParameterUpdate]] = {}
    for one in updates:
        groups.setdefault((one.lr, one.weight_decay, one.grad_scale, one.count), []).append(one)
    return list(groups.values())
