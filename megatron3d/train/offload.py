"""From the options to the backings of offloaded state on this rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.config.sections.parallel import ParallelConfig
from megatron3d.offload.backing import FileBacking, HostBacking, StateBacking
from megatron3d.offload.file_store import FileStore
from megatron3d.optim.build import build_optimizer
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


def _backing(place: str, parallel: ParallelConfig, label: str, device: torch.device) -> StateBacking | None:
    if place == "none":
        return None
    if place == "cpu":
        return HostBacking(device)
    assert parallel.offload_dir is not None, f"offloading {label} to files without --offload-dir passed the checks"
    return FileBacking(FileStore(Path(parallel.offload_dir), label), device)
