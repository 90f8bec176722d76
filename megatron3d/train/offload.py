"""From the options to the backings of offloaded state, and the store of offloaded activations, on this rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megatron3d.config.rules.offload import NO_DIRECTORY
from megatron3d.config.sections.optim import OptimConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.errors import ConfigError
from megatron3d.offload.activations import FileInputs, HostInputs
from megatron3d.offload.backing import FileBacking, HostBacking, StateBacking
from megatron3d.offload.file_store import FileStore
from megatron3d.optim.build import build_optimizer
from megatron3d.tensor.kept_inputs import InputStore
from megatron3d.zero.offload import Offload, state_kinds


def offload_of(parallel: ParallelConfig, optim: OptimConfig, *, rank: int, device: torch.device) -> Offload:
    """What lives off the device, with empty backings.

    Raises:
        StorageError: files cannot be made under --offload-dir.
    """
    if parallel.offload_optimizer == "none":
        return Offload()
    # What an optimizer keeps, and in which dtypes, only it knows: so one is asked that has next to nothing to keep.
    probe = build_optimizer(optim, [(nn.Parameter(torch.empty(0)), True)])
    return Offload(
        states=_backing(parallel.offload_optimizer, parallel, f"rank{rank:05d}-states", device),
        weights=_backing(parallel.offload_params, parallel, f"rank{rank:05d}-weights", device),
        state_kinds=state_kinds(probe),
        delays_update=parallel.offload_delayed_update,
    )


def kept_inputs_of(parallel: ParallelConfig, *, rank: int, device: torch.device) -> InputStore | None:
    """Where the inputs of recomputed layers are kept off the device; None where they stay.

    Raises:
        ConfigError: the device is a CPU, and there is no --offload-dir.
        StorageError: files cannot be made there.
    """
    if not parallel.offload_activations:
        return None
    if device.type != "cpu":
        return HostInputs(device)
    if parallel.offload_dir is None:
        raise ConfigError(NO_DIRECTORY)
    return FileInputs(Path(parallel.offload_dir), f"rank{rank:05d}-inputs")


def _backing(place: str, parallel: ParallelConfig, label: str, device: torch.device) -> StateBacking | None:
    if place == "none":
        return None
    if place == "cpu":
        return HostBacking(device)
    assert parallel.offload_dir is not None, f"offloading {label} to files without --offload-dir passed the checks"
    return FileBacking(FileStore(Path(parallel.offload_dir), label), device)
