"""The device a rank computes on: the one module that names `torch.cuda`.

Everything else holds a `torch.device` and calls these functions, so CPU and CUDA take the same path.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron3d.errors import ConfigError


def likely_device_type(wanted: str | None) -> str:
    """ "cuda" or "cpu": what `--device` says, else CUDA where there is any GPU; for predictions before a run starts."""
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_device(wanted: str | None, *, local_rank: int, local_world_size: int) -> torch.device:
    """The device of this rank: one GPU for each local rank, or the CPU.

    Args:
        wanted: "cuda", "cpu", or None for CUDA where there is a GPU for every local rank.

    Raises:
        ConfigError: "cuda" was asked for and there are fewer GPUs than local ranks.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and num_gpus < local_world_size:
        raise ConfigError(_too_few_gpus(num_gpus, local_world_size))
    if wanted == "cpu" or num_gpus < max(local_world_size, 1):
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _too_few_gpus(num_gpus: int, num_ranks: int) -> str:
    """Why --device cuda cannot be had, and what to do: no GPU at all has other remedies than one too few."""
    if num_gpus:
        return (
            f"--device cuda needs one GPU for each of the {num_ranks} ranks of this machine, and torch sees "
            f"{num_gpus}; start torchrun with --nproc-per-node {num_gpus}, or use --device cpu."
        )
    if torch.version.cuda is None:
        return (
            f"--device cuda needs a GPU, and the installed torch {torch.__version__} is a build without CUDA; install "
            "a CUDA build of torch, or use --device cpu."
        )
    return (
        "--device cuda needs a GPU, and torch sees none on this machine; look at nvidia-smi and CUDA_VISIBLE_DEVICES, "
        "or use --device cpu."
    )


_FIRST_WITH_FP8, _WITH_FP8_BLOCKS = (8, 9), (9, 0)


def require_fp8(device: torch.device, *, by_blocks: bool) -> None:
    """Refuse a GPU that has no products of fp8 matrices, with a scale for each or `by_blocks`.

    Raises: ConfigError with what it has and what to use instead.
    """
    if device.type != "cuda":
        return
    has = torch.cuda.get_device_capability(device)
    name = f"{device_name(device)} has compute capability {has[0]}.{has[1]}"
    if has < _FIRST_WITH_FP8:
        raise ConfigError(f"--fp8-format needs a GPU of compute capability 8.9 or more, and {name}; use --bf16 alone.")
    if by_blocks and has != _WITH_FP8_BLOCKS:
        raise ConfigError(
            f"--fp8-recipe blockwise needs a GPU of compute capability 9.0 (Hopper), and {name}; use --fp8-recipe "
            "tensorwise."
        )


def backend_of(device: torch.device) -> str:
    """The torch.distributed backend for a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def set_fp32_precision(device: torch.device, precision: str) -> None:
    """How this process multiplies fp32 matrices from now on: "highest", "high" (TF32) or "medium", as torch means it.

    Raises:
        ConfigError: anything but "highest" on a CPU.
    """
    if precision == "highest":
        return
    if device.type != "cuda":
        raise ConfigError(f"--fp32-matmul-precision {precision} is for GPUs, and the device is {device.type}; drop it.")
    torch.set_float32_matmul_precision(precision)


def runs_ahead(device: torch.device) -> bool:
    """Whether Python runs ahead of the device, which works on what was queued before."""
    return device.type == "cuda"


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on the host brought to a device, without waiting for what the device does; on the CPU it is there."""
    # From pageable memory the copy would wait for the stream. torch keeps pinned memory until the copy is made.
    return (x.pin_memory() if runs_ahead(device) else x).to(device, non_blocking=True)


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


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, as (9, 0) of an H100; (0, 0) of any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


HOST_ALIGNMENT_BYTES = 4096  # of buffers that direct file access reads into: a page, and a block of every common disk


def empty_on_host(num_bytes: int, device: torch.device) -> Tensor:
    """Uninitialised bytes on the host at the start of a page, pinned where `device` is a GPU that copies them."""
    spare = torch.empty(num_bytes + HOST_ALIGNMENT_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    start = -spare.data_ptr() % HOST_ALIGNMENT_BYTES
    return spare[start : start + num_bytes]


class Copy:
    """A copy between host and device under way, or already made where both are the CPU."""

    def __init__(self, event: torch.Event | None) -> None:
        self._event = event

    def wait(self) -> None:
        """Block the host until the target holds what was copied."""
        if self._event is not None:
            self._event.synchronize()


class HostCopies:
    """Copies between host and device, on CUDA beside the computation on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def nothing(self) -> Copy:
        """A copy that is over, where none is needed."""
        return Copy(None)

    def start(self, target: Tensor, source: Tensor) -> Copy:
        """Start copying `source` into `target` after what is queued on the device now, converting dtypes.

        Neither may change until `wait` of the result; on the CPU the copy is made before this returns.
        """
        if self._stream is None:
            target.copy_(source)
            return Copy(None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = self._stream.record_event()
        for tensor in (target, source):
            if tensor.device.type == "cuda":
                tensor.record_stream(self._stream)  # its memory must not be reused before the copy is made
        return Copy(event)


def marker_of(device: torch.device) -> Callable[[], Callable[[], bool]] | None:
    """Marks the moment at which everything queued so far on the current stream of a GPU is done, and returns whether
    that has come; None for the CPU, which is never ahead of its work."""
    if device.type != "cuda":
        return None

    def mark() -> Callable[[], bool]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event.query

    return mark


TimeMark = float | torch.cuda.Event


class Clock:
    """Moments between the parts of a device's work: of its own time on CUDA, where Python runs ahead of the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> TimeMark:
        """The moment at which everything queued so far on the current stream is done, without waiting for it."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        return time.perf_counter()

    def settle(self) -> None:
        """Wait until everything queued is done, and so every moment is known."""
        synchronize(self._device)

    def seconds_between(self, start: TimeMark, end: TimeMark) -> float:
        """Time from one moment to another one of this clock, in seconds; `settle` first."""
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return start.elapsed_time(end) / 1000.0
        assert isinstance(start, float) and isinstance(end, float), "moments of two kinds of device"
        return end - start
