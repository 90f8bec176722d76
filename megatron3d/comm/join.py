"""Joining and leaving the job: torch.distributed in a process that knows its place from `launch.py`."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from megatron3d.comm.device import backend_of
from megatron3d.comm.launch import Launch
from megatron3d.errors import PeerError


def join(launch: Launch, device: torch.device, *, timeout: timedelta) -> None:
    """Start torch.distributed for this process, if the job has more than one.

    The keys in the store carry the restart count: after an elastic restart the store still holds those of the run
    before, and reusing them lets new workers connect to dead ones.
    """
    if launch.world_size == 1:
        return
    store, rank, world_size = next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
    store.set_timeout(timeout)
    dist.init_process_group(
        backend_of(device),
        store=dist.PrefixStore(f"megatron3d/{launch.restart_count}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def leave() -> None:
    """End torch.distributed in this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error came from a collective that lost a peer or timed out."""
    if isinstance(error, PeerError | dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Timed out waiting",
        "gloo/transport",
        "NCCL error",
    )
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
