"""The one door to Triton: what is installed, how a kernel is compiled, launched and fed with rows.

Kernel files write `@jit` and `tl.` as if Triton were always there. Where it is not, `jit` returns the plain function,
which nobody calls because the selection picks the reference; so every file imports on every machine.
The selection (`selection.py`) decides when Triton runs; this file only makes it possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = None
    tl = None
    MISSING_REASON = f"Triton cannot be imported ({error})"
else:
    MISSING_REASON = ""

MAX_BLOCK = 65536
"""Widest row, in elements, that a kernel keeps in registers at once."""


NORM_CHUNK_ELEMENTS = 1 << 16
"""Elements that the norms widen at a time on a CPU: 256 KiB in fp32, which stay in the cache of a core."""


class KernelError(ValueError):
    """A kernel was asked for something it cannot do; the message names the kernel, the value and the way out."""


@dataclass(frozen=True)
class TritonSupport:
    """Whether Triton kernels can run here, and in which way.

    `installed`: the module imports. `interpreted`: kernels run in Triton's own CPU interpreter, which is chosen by
    Triton itself when it is imported (TRITON_INTERPRET=1). `detail`: version, or why it is missing.
    """

    installed: bool
    interpreted: bool
    detail: str


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function` with Triton on its first launch; without Triton, return it as it is (never launched)."""
    return function if triton is None else triton.jit(function)


def _nothing() -> None:
    """A kernel without work; compiling it shows which kind of kernel Triton makes in this process."""


def detect_triton() -> TritonSupport:
    """Look once at what `import triton` gave: compiled kernels, interpreted ones, or nothing."""
    if triton is None:
        return TritonSupport(installed=False, interpreted=False, detail=MISSING_REASON)
    interpreted = not isinstance(jit(_nothing), triton.JITFunction)
    return TritonSupport(installed=True, interpreted=interpreted, detail=f"Triton {triton.__version__}")


TRITON = detect_triton()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **constants: Any) -> None:
    """Run a Triton kernel over `grid` on `device`; an empty grid is no launch, and neither are tensors without memory.

    Triton launches on the current device, so tensors of another one would be read across devices and out of order with
    their own stream: the tensors' device is made current around the launch.
    """
    if 0 in grid or device.type == "meta":
        return
    with torch.accelerator.device_index(device.index):
        kernel[grid](*arguments, **constants)


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device. A GPU copies it from pinned memory; from any other the host would wait for all
    that is queued there."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x [..., H] as [rows, H] with neighbouring columns; a copy only where no such view exists."""
    num_columns = x.shape[-1]
    if x.stride(-1) != 1 and num_columns > 1:
        x = x.contiguous()
    return x.reshape(math.prod(x.shape[:-1]), num_columns)


def row_chunks(rows: torch.Tensor, elements: int) -> Iterator[slice]:
    """Slices of rows [R, C] of at most `elements` elements, at least one row each."""
    num_rows, num_columns = rows.shape
    step = max(1, elements // max(1, num_columns))
    return (slice(first, first + step) for first in range(0, num_rows, step))


def block_of(num_columns: int, *, limit: int = MAX_BLOCK) -> int:
    """Smallest power of two that covers `num_columns`, at most `limit` (itself a power of two)."""
    return min(1 << max(num_columns - 1, 0).bit_length(), limit)


def row_programs(num_rows: int, column_blocks: int, programs: int) -> int:
    """Programs along the rows, at least one and at most one a row, of about so many in all."""
    return max(1, min(num_rows, programs // column_blocks))


def whole_row_block(kernel_name: str, num_columns: int) -> int:
    """Block for kernels that keep a whole row in registers.

    Raises KernelError where the row is wider than MAX_BLOCK.
    """
    if num_columns > MAX_BLOCK:
        raise KernelError(
            f"The Triton kernel {kernel_name} keeps a row of at most {MAX_BLOCK} elements in registers, but the last "
            f"dimension is {num_columns}; use Registry({{'{kernel_name}': 'reference'}})."
        )
    return block_of(num_columns)


def num_warps_for(block: int) -> int:
    """Warps per program: about 16 elements a thread, between 4 and 16 warps (AMD allows 16 of 64 threads)."""
    return max(4, min(16, block // 512))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic inside a kernel: fp32, or fp64 for fp64 tensors (reference only)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
