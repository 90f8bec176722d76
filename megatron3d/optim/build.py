"""Building torch's fused optimizers over flat pieces of master weights.

An optimizer here sees a few long one-dimensional fp32 tensors and nothing parallel: the update is elementwise, so it
does not matter which part of which parameter an element is.

Source: Loshchilov and Hutter 2019 (AdamW), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megatron3d.config.optim import OptimConfig


def state_names(config: OptimConfig) -> tuple[str, ...]:
    """The tensors of state that the optimizer keeps for every parameter, by torch's names."""
    if config.optimizer == "adam":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.sgd_momentum else ()


def build_optimizer(config: OptimConfig, pieces: Iterable[tuple[nn.Parameter, bool]]) -> torch.optim.Optimizer:
    """A fused optimizer with its state allocated, so that a checkpoint can be loaded into it before the first step.

    Args:
        config: kind and coefficients.
        pieces: (parameter, whether weight decay applies); parameters are one-dimensional fp32.
    """
    by_decay: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter, decays in pieces:
        by_decay[decays].append(parameter)
    groups = [{"params": parameters, "decays": decays} for decays, parameters in by_decay.items()]
    if config.optimizer == "adam":
        betas = (config.adam_beta1, config.adam_beta2)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=betas, eps=config.adam_eps, weight_decay=0.0, fused=True
        )
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum, weight_decay=0.0, fused=True)
    _allocate_state(optimizer, config)
    return optimizer


def _allocate_state(optimizer: torch.optim.Optimizer, config: OptimConfig) -> None:
    """Zeros for every piece; torch would allocate them at the first step, too late for loading a checkpoint."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {name: torch.zeros_like(parameter) for name in state_names(config)}
            if config.optimizer == "adam":
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter].update(state)


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate, and weight decay where it applies."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def step_count(optimizer: torch.optim.Optimizer) -> int:
    """Updates made so far, as Adam's bias correction counts them (0 for optimizers that do not count)."""
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counts, default=0)


def set_step_count(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Go on counting from a checkpoint's number of updates."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(count)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state, without the scalar counters."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
