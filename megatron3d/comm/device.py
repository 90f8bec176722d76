"""The device a rank computes on: the one module that names `torch.cuda`.

Everything else holds a `torch.device` and calls these functions, so CPU and CUDA take the same path.
"""

from __future__ import annotations

import resource
import sys

import torch

from megatron3d.errors import ConfigError


def pick_device(wanted: str | None, *, local_rank: int, local_world_size: int) -> torch.device:
    """The device of this rank: one GPU for each local rank, or the CPU.

    Args:
        wanted: "cuda", "cpu", or None for CUDA where there is a GPU for every local rank.

    Raises:
        ConfigError: "cuda" was asked for and there are fewer GPUs than local ranks.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and num_gpus < local_world_size:
        raise ConfigError(
            f"--device cuda needs one GPU for each of the {local_world_size} ranks of this machine and {num_gpus} "
            f"can be seen; start {max(num_gpus, 1)} ranks with --nproc-per-node, or use --device cpu"
        )
    if wanted == "cpu" or num_gpus < max(local_world_size, 1):
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def backend_of(device: torch.device) -> str:
    """The torch.distributed backend for a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: of the allocator on CUDA, of the whole process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux reports KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """The marketing name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
