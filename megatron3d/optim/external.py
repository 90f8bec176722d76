"""NVIDIA's fused Adam, from apex or Transformer Engine, where the user asks for it by name.

Both update flat fp32 parameters on the GPU with the state names of torch's Adam, so checkpoints are the same.
They count steps in the groups, once for every call of `step`, whichever parameters have a gradient.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.errors import ConfigError
from megatron3d.optim.adam import new_moments
from megatron3d.optim.moments import MOMENT_DTYPES

_MODULES: Mapping[str, str] = MappingProxyType(
    {"apex": "apex.optimizers", "transformer-engine": "transformer_engine.pytorch.optimizers"}
)
_SOURCES: Mapping[str, str] = MappingProxyType(
    {"apex": "https://github.com/NVIDIA/apex", "transformer-engine": "https://github.com/NVIDIA/TransformerEngine"}
)


def external_adam(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The fused Adam of `--optimizer-implementation`, with its state allocated.

    Raises:
        ConfigError: the package cannot be imported, is another one of the same name, or does not run here.
    """
    name = config.optimizer_implementation
    fused_adam = _module(name).FusedAdam
    settings: dict[str, Any] = {
        "lr": 0.0,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "weight_decay": 0.0,
        "adam_w_mode": config.decoupled_weight_decay,
    }
    keeps_bf16 = "bf16" in (config.exp_avg_dtype, config.exp_avg_sq_dtype)
    if keeps_bf16:
        settings["exp_avg_dtype"] = MOMENT_DTYPES[config.exp_avg_dtype]
        settings["exp_avg_sq_dtype"] = MOMENT_DTYPES[config.exp_avg_sq_dtype]
    full = [group for group in groups if group["params"]]
    if not full:
        return torch.optim.AdamW(groups)  # a rank that updates nothing
    try:
        optimizer = fused_adam(full, **settings)
    except (RuntimeError, ImportError, TypeError) as error:
        raise ConfigError(_advice(name, f"does not build its FusedAdam here ({error})")) from error
    for group in optimizer.param_groups:
        group["step"] = 0
        for parameter in group["params"]:
            if keeps_bf16:
                optimizer.initialize_state(parameter, False)  # it keeps scales beside states that are not fp32
            else:
                optimizer.state[parameter].update(new_moments(parameter, config))
    return optimizer


def _module(name: str) -> ModuleType:
    package = _MODULES[name].partition(".")[0]
    found = importlib.util.find_spec(package)
    if found is None:
        raise ConfigError(_advice(name, "is not installed"))
    try:
        return importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith(package):
            problem = f"names a package that is not NVIDIA's: {found.origin} has no {_MODULES[name]}"
            raise ConfigError(_advice(name, problem)) from error
        raise ConfigError(_advice(name, f"cannot be imported ({error})")) from error
    except (ImportError, OSError) as error:
        raise ConfigError(_advice(name, f"cannot be imported ({error})")) from error


def _advice(name: str, problem: str) -> str:
    return (
        f"--optimizer-implementation {name} {problem}; install it from {_SOURCES[name]} for this torch and CUDA, or "
        "use --optimizer-implementation torch."
    )
