"""Joining and leaving the job: torch.distributed in a process that knows its place from `launch.py`."""

from __future__ import annotations

import re
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron3d.comm.device import backend_of
from megatron3d.comm.launch import Launch
from megatron3d.errors import ConfigError, Megatron3dError, PeerError


def join(launch: Launch, device: torch.device, *, timeout: timedelta) -> dist.Store | None:
    """Start torch.distributed for this process, if the job has more than one; returns the store at which they met.

    The keys in the store carry the restart count: after an elastic restart the store still holds those of the run
    before, and reusing them lets new workers connect to dead ones.

    Raises:
        ConfigError: the place where the processes meet is not given, or its port is taken by another program.
        PeerError: not all of them came there within `timeout`.
    """
    if launch.world_size == 1:
        return None
    _require_address(launch)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _meeting_error(error, launch, timeout) from error
    store.set_timeout(timeout)
    store = dist.PrefixStore(f"megatron3d/{launch.restart_count}", store)
    dist.init_process_group(
        backend_of(device),
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return store


def _require_address(launch: Launch) -> None:
    """Raises: ConfigError if the other processes cannot be found."""
    values = {"MASTER_ADDR": launch.master_addr, "MASTER_PORT": launch.master_port}
    missing = " and ".join(name for name, value in values.items() if not value)
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {launch.world_size}, so this process (RANK {launch.rank}) has others to meet, but without "
            f"{missing} it does not know where; start with torchrun, or set MASTER_ADDR (the host of rank 0) and "
            "MASTER_PORT (a free port there) in every process"
        )


def _meeting_error(error: Exception, launch: Launch, timeout: timedelta) -> Megatron3dError:
    """The sentence for processes that did not all meet."""
    text, place = str(error), f"{launch.master_addr}:{launch.master_port}"
    if "EADDRINUSE" in text or "address already in use" in text:
        return ConfigError(
            f"MASTER_PORT {launch.master_port} on {launch.master_addr} is in use by another program, and rank 0 must "
            "listen there; choose a free port (torchrun --standalone finds one by itself)"
        )
    minutes = f"{timeout.total_seconds() / 60:g} minutes (--distributed-timeout-minutes)"
    joined = re.search(r"(\d+)/(\d+) clients joined", text)
    if joined:
        return PeerError(
            f"{joined[1]} of {joined[2]} ranks came to {place} within {minutes}; look for the others: a rank that "
            "failed earlier, a machine that did not start, or one that cannot reach this address"
        )
    return PeerError(
        f"rank {launch.rank} could not meet the others at {place} within {minutes}: {text.splitlines()[0]}; look "
        "whether rank 0 runs and whether its machine can be reached"
    )


def leave() -> None:
    """End torch.distributed in this process."""
    if dist.is_initialized():
        dist.destroy_process_group()
