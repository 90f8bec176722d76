"""How a process learns its place from `torchrun`, and joins and leaves the job. The only reader of the environment."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron3d.comm.device import backend_of
from megatron3d.errors import PeerError


@dataclass(frozen=True)
class Launch:
    """What the launcher says: global and local rank, and how often the job was restarted."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restart_count: int = 0


def read_launch() -> Launch:
    """Read `torchrun`'s variables; a process started without it is rank 0 of 1."""
    env = os.environ
    return Launch(
        rank=int(env.get("RANK", 0)),
        world_size=int(env.get("WORLD_SIZE", 1)),
        local_rank=int(env.get("LOCAL_RANK", 0)),
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", 1))),
        restart_count=int(env.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )


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


def end_process(code: int) -> NoReturn:
    """End this process now with an exit code, without waiting for threads of collectives that may never finish."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
