"""Which implementation of a kernel runs: by device and dtype, or as the caller forces it; and why.

A `Kernel` is a name and two implementations of the same contract: `reference` in plain torch, `triton` beside it.
A `Selection` is an immutable value that picks one for a tensor; every kernel function takes `selection=`, and the
`Registry` (`registry.py`) is a selection with the kernels as methods.
The rule of the default: Triton on CUDA (also ROCm) for fp32, bf16 and fp16; the reference everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch

from megatron3d_kernels.launch import TRITON, KernelError, TritonSupport

Implementation = TypeVar("Implementation")

REFERENCE = "reference"
TRITON_NAME = "triton"
IMPLEMENTATIONS = (REFERENCE, TRITON_NAME)
KERNEL_NAMES = (
    "layer_norm",
    "rms_norm",
    "residual_norm",
    "dropout",
    "activation",
    "gated_activation",
    "rotary",
    "query_key_value",
    "query_key_norm",
    "cross_entropy",
    "adam",
    "fp8_cast",
)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHOWN_DTYPES = (*TRITON_DTYPES, torch.float64)
SHOWN_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Kernel(Generic[Implementation]):
    """One operation with its two implementations (a function, or a small record of functions), alike in contract."""

    name: str
    reference: Implementation
    triton: Implementation

    def __post_init__(self) -> None:
        """Refuse a name that `KERNEL_NAMES` does not list, since it could not be forced or explained."""
        assert self.name in KERNEL_NAMES, f"kernel {self.name!r} is missing from KERNEL_NAMES {KERNEL_NAMES}"


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and the reason in words."""

    implementation: str
    reason: str


class Selection:
    """Picks implementations; immutable, so it may be shared, passed along and used as a default argument."""

    def __init__(self, force: str | Mapping[str, str] | None = None, *, support: TritonSupport = TRITON) -> None:
        """Decide once for all calls.

        force: "reference" or "triton" for every kernel, or {kernel name: one of them} for some.
        support: what Triton can do in this process; another value serves tests.

        Raises KernelError for an unknown kernel or implementation, and where Triton is forced but not installed.
        """
        self._support = support
        self._forced = MappingProxyType(_forced_by_name(force))
        if not support.installed and TRITON_NAME in self._forced.values():
            raise KernelError(
                f"The implementation 'triton' is forced, but {support.detail}; install triton or force 'reference'."
            )
        compiled = support.installed and not support.interpreted
        self._default_keys = frozenset(("cuda", dtype) for dtype in TRITON_DTYPES if compiled)
        # On the meta device a launch does nothing, so that a GPU's memory can be counted without one.
        devices = ("cpu", "cuda", "meta") if support.interpreted else ("cuda", "meta")
        self._possible_keys = frozenset((device, dtype) for device in devices for dtype in TRITON_DTYPES)

    def pick(self, kernel: Kernel[Implementation], x: torch.Tensor) -> Implementation:
        """The implementation of `kernel` for the device and dtype of `x`; two lookups, called at every use.

        Raises KernelError where Triton is forced and cannot run on such a tensor.
        """
        key = (x.device.type, x.dtype)
        forced = self._forced.get(kernel.name)
        if forced is None:
            return kernel.triton if key in self._default_keys and not self.is_fused(kernel.name) else kernel.reference
        if forced == REFERENCE:
            return kernel.reference
        if key not in self._possible_keys:
            raise KernelError(self._refusal(kernel.name, *key))
        return kernel.triton

    def is_fused(self, kernel_name: str) -> bool:
        """Whether a compiler traces the call that asks, and Triton is not forced: then a kernel is its definition in
        torch, which the compiler fuses with what is around it."""
        return torch.compiler.is_compiling() and self._forced.get(kernel_name) != TRITON_NAME

    def choose(self, kernel_name: str, device_type: str, dtype: torch.dtype) -> Choice:
        """What `pick` does for such a tensor, with the reason.

        Raises KernelError where `pick` would.
        """
        forced = self._forced.get(kernel_name)
        key = (device_type, dtype)
        if forced == TRITON_NAME and key not in self._possible_keys:
            raise KernelError(self._refusal(kernel_name, device_type, dtype))
        if forced is not None:
            return Choice(forced, "forced by the caller")
        if key in self._default_keys:
            return Choice(TRITON_NAME, self._support.detail)
        return Choice(REFERENCE, self._why_not_triton(device_type, dtype))

    def explain(self, kernel_names: Iterable[str] = KERNEL_NAMES) -> str:
        """A table for people: kernel, device, the implementation that runs there, for which dtypes, and why."""
        rows = [("kernel", "device", "runs", "dtypes", "because")]
        for name in kernel_names:
            for device_type in SHOWN_DEVICES:
                dtypes_by_outcome: dict[tuple[str, str], list[str]] = {}
                for dtype in SHOWN_DTYPES:
                    outcome = self._outcome(name, device_type, dtype)
                    dtypes_by_outcome.setdefault(outcome, []).append(str(dtype).removeprefix("torch."))
                rows += [(name, device_type, runs, ",".join(d), why) for (runs, why), d in dtypes_by_outcome.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]) for row in rows)

    def _outcome(self, kernel_name: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
        """Implementation and reason as `explain` shows them; a refusal is a line, not raised."""
        if self._forced.get(kernel_name) == TRITON_NAME and (device_type, dtype) not in self._possible_keys:
            return "error", f"triton is forced, but {self._why_not_triton(device_type, dtype)}"
        choice = self.choose(kernel_name, device_type, dtype)
        return choice.implementation, choice.reason

    def _why_not_triton(self, device_type: str, dtype: torch.dtype) -> str:
        """The first reason why Triton is not taken for such a tensor."""
        if not self._support.installed:
            return self._support.detail
        if dtype not in TRITON_DTYPES:
            return f"the Triton kernels compute in float32, too coarse for {str(dtype).removeprefix('torch.')}"
        if device_type != "cuda":
            return f"Triton kernels run on CUDA devices, not on {device_type}"
        return "Triton's interpreter is on in this process, which is for tests only"

    def _refusal(self, kernel_name: str, device_type: str, dtype: torch.dtype) -> str:
        """The sentence for a forced Triton kernel that cannot run."""
        return (
            f"The kernel {kernel_name} is forced to 'triton' for a {dtype} tensor on {device_type}, but "
            f"{self._why_not_triton(device_type, dtype)}; force 'reference' or force nothing."
        )


def _forced_by_name(force: str | Mapping[str, str] | None) -> dict[str, str]:
    """Spell `force` out as {kernel name: implementation}, checked."""
    named: Mapping[str, Any] = dict.fromkeys(KERNEL_NAMES, force) if isinstance(force, str) else (force or {})
    for name, implementation in named.items():
        if name not in KERNEL_NAMES:
            raise KernelError(f"The kernel {name!r} does not exist; the kernels are {', '.join(KERNEL_NAMES)}.")
        if implementation not in IMPLEMENTATIONS:
            raise KernelError(
                f"The kernel {name} cannot be forced to {implementation!r}; use one of {', '.join(IMPLEMENTATIONS)}."
            )
    return dict(named)


DEFAULT_SELECTION = Selection()
"""The rule without anything forced."""
