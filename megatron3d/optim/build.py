"""Building the optimizer of a run over flat parameters, which are spans of the master weights.

An optimizer here sees a few long one-dimensional fp32 tensors and nothing parallel. Most updates are elementwise, so it
does not matter which part of which parameter an element is; LAMB, Adafactor and Muon ask a `FullAccess` for what
concerns full parameters. All leave parameters without a gradient alone, so a step can be made unit by unit.

Source: Loshchilov and Hutter 2019 (AdamW), algorithm 2, for Adam; the others name theirs in their own files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from megatron3d_kernels.selection import DEFAULT_SELECTION, Selection
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.config.update_rules import UPDATE_RULES
from megatron3d.errors import ConfigError
from megatron3d.optim.adafactor import Adafactor
from megatron3d.optim.adam import FusedAdam
from megatron3d.optim.combined import CombinedOptimizer
from megatron3d.optim.external import external_adam
from megatron3d.optim.flat import FlatOptimizer
from megatron3d.optim.lamb import Lamb
from megatron3d.optim.lion import Lion
from megatron3d.optim.muon import Muon
from megatron3d.optim.sgd import FusedSgd
from megatron3d.params.boxes import ShardView
from megatron3d.params.owned_slice import FullAccess

_ELEMENTWISE: Mapping[str, type[FlatOptimizer]] = {
    "lion": Lion,
    "sgd": FusedSgd,
}
_OVER_FULL_PARAMETERS = {"lamb": Lamb, "adafactor": Adafactor}


def kind(config: OptimConfig) -> str:
    """Which state an optimizer keeps, as checkpoints note it: the same word where one can go on from the other's."""
    if config.optimizer == "adamw":
        return "adam"
    if config.optimizer == "muon" and config.muon_scalar_optimizer != "adam":
        return f"muon with {config.muon_scalar_optimizer}"
    return config.optimizer


def state_names(config: OptimConfig) -> tuple[str, ...]:
    """The states with an element for each element of a parameter, by torch's names; a parameter may lack some."""
    if config.optimizer == "sgd" and not config.sgd_momentum:
        return ()
    beside = UPDATE_RULES[config.muon_scalar_optimizer].states if config.optimizer == "muon" else ()
    return (*UPDATE_RULES[config.optimizer].states, *beside)


def other_state_views(optimizer: torch.optim.Optimizer, *, with_copies: bool) -> dict[str, ShardView]:
    """The states that are not shaped like their parameters, by "state name/parameter name"; a checkpoint's business.

    Copies of tied tables are left out unless `with_copies`.
    """
    return optimizer.state_views(with_copies=with_copies) if isinstance(optimizer, Adafactor) else {}


def build_optimizer(
    config: OptimConfig,
    parameters: Iterable[tuple[nn.Parameter, bool]],
    full: FullAccess | None = None,
    *,
    kernels: Selection = DEFAULT_SELECTION,
) -> torch.optim.Optimizer:
    """An optimizer with its state allocated, so that a checkpoint can be loaded into it before the first step.

    Args:
        config: kind and coefficients.
        parameters: (parameter, whether weight decay applies); parameters are one-dimensional fp32.
        full: which parameters of the model they hold, for lamb, adafactor and muon; others do not ask.
        kernels: pick the implementation of Adam.

    Raises:
        ConfigError: an implementation that is not here, or a `full` that is needed and missing.
    """
    listed = list(parameters)
    groups = _groups(listed)
    if config.optimizer in ("adam", "adamw"):
        return _adam(groups, config, kernels)
    if config.optimizer in _ELEMENTWISE:
        return _ELEMENTWISE[config.optimizer](groups, config)
    if full is None:
        raise ConfigError(
            f"--optimizer {config.optimizer} needs to know whole parameters, which are not given here; use adam"
        )
    if config.optimizer in _OVER_FULL_PARAMETERS:
        return _OVER_FULL_PARAMETERS[config.optimizer](groups, config, full)
    return _muon(listed, config, full, kernels)


def _groups(parameters: list[tuple[nn.Parameter, bool]]) -> list[dict[str, Any]]:
    by_decay = {decays: [flat for flat, its in parameters if its == decays] for decays in (True, False)}
    return [{"params": parameters, "decays": decays} for decays, parameters in by_decay.items()]


def _adam(groups: list[dict[str, Any]], config: OptimConfig, kernels: Selection) -> torch.optim.Optimizer:
    if config.optimizer_implementation != "torch":
        return external_adam(groups, config)
    return FusedAdam(groups, config, kernels=kernels)


def _muon(
    parameters: list[tuple[nn.Parameter, bool]], config: OptimConfig, full: FullAccess, kernels: Selection
) -> torch.optim.Optimizer:
    matrices = {p.flat for p in full.owned_slices() if p.flat is not None and p.spec.is_hidden_matrix}
    hidden = [(flat, decays) for flat, decays in parameters if flat in matrices]
    others = _groups([(flat, decays) for flat, decays in parameters if flat not in matrices])
    scalar = Lion(others, config) if config.muon_scalar_optimizer == "lion" else _adam(others, config, kernels)
    return CombinedOptimizer([Muon(_groups(hidden), config, full), scalar])


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate, and weight decay where it applies."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def set_grad_scale(optimizer: torch.optim.Optimizer, scale: float) -> bool:
    """Let the next step multiply gradients by `scale` as it reads them; False where the optimizer does not do that, so
    that somebody has to do it before."""
    if not all("grad_scale" in group for group in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        group["grad_scale"] = scale
    return True


def write_copies(optimizer: torch.optim.Optimizer, copies: Mapping[nn.Parameter, Tensor]) -> bool:
    """Let every step bring the copies, of all parameters, up to date; False where the optimizer does not do that."""
    members = optimizer.optimizers if isinstance(optimizer, CombinedOptimizer) else (optimizer,)
    flat = [one for one in members if isinstance(one, FlatOptimizer)]
    if len(flat) < len(members):
        return False
    for one in flat:
        one.write_copies(copies)
    return True


def step_count(optimizer: torch.optim.Optimizer) -> int:
    """Updates made so far, as bias corrections count them (0 for optimizers that do not count)."""
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    counts += [int(group["step"]) for group in optimizer.param_groups if "step" in group]
    return max(counts, default=0)


def set_step_count(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Go on counting from a checkpoint's number of updates."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(count)
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = count


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state, without the scalar counters."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
