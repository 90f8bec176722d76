"""Which of torch's attention kernels may run, by device, dtype, mask and dropout: one table.

Left to itself torch takes the kernel that computes the scores [B, N, S, T] whole wherever no other takes the inputs,
without a word. Here kernels are named, in order of preference, and torch raises an error where none of them can run.
That kernel ("math") is among them where it is asked for, and where the inputs are fp64, which no other takes.

The names of `BACKENDS` are Megatron-LM's (`--attention-backend`): flash is FlashAttention, fused is cuDNN, unfused and
local are two products and a softmax, of which there is one implementation here.

Source: torch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, for what each kernel takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType

import torch
import torch.nn.attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron3d_kernels.launch import KernelError

AUTO, FLASH, FUSED, UNFUSED, LOCAL = "auto", "flash", "fused", "unfused", "local"
BACKENDS = (AUTO, FLASH, FUSED, UNFUSED, LOCAL)
EFFICIENT, MATH = "efficient", "math"

HOPPER = (9, 0)
_16_BITS = (torch.float16, torch.bfloat16)
_TORCH: Mapping[str, SDPBackend] = MappingProxyType(
    {
        FUSED: SDPBackend.CUDNN_ATTENTION,
        FLASH: SDPBackend.FLASH_ATTENTION,
        EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
        MATH: SDPBackend.MATH,
    }
)
TITLES: Mapping[str, str] = MappingProxyType(
    {
        FUSED: "cuDNN",
        FLASH: "FlashAttention",
        EFFICIENT: "torch's memory-efficient kernel",
        MATH: "two products and a softmax",
    }
)


@dataclass(frozen=True)
class AttentionCase:
    """What decides. `capability` is a CUDA device's; `masked` says that a mask is given beside or instead of causal
    attention."""

    device_type: str
    dtype: torch.dtype
    capability: tuple[int, int] = (0, 0)
    masked: bool = False
    drops: bool = False


@dataclass(frozen=True)
class AttentionChoice:
    """What a run asks for, and the compute capability of its CUDA device, without which none is taken for a Hopper."""

    backend: str = AUTO
    capability: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Raises KernelError for a backend that there is not."""
        if self.backend not in BACKENDS:
            raise KernelError(f"There is no attention backend {self.backend!r}; use one of {', '.join(BACKENDS)}.")


def kernels_for(case: AttentionCase, backend: str = AUTO) -> tuple[str, ...]:
    """The kernels that may compute it, the preferred one first.

    Raises KernelError where the backend that is asked for takes no such inputs.
    """
    if backend in (UNFUSED, LOCAL):
        return (MATH,)
    if backend != AUTO:
        refusal = _refusal(case, backend)
        if refusal:
            raise KernelError(f"The attention backend {backend!r} {refusal}; use 'auto'.")
        return (backend,)
    if case.device_type != "cuda":
        return (FLASH, MATH)
    if case.dtype not in _16_BITS:
        return (MATH,) if case.dtype == torch.float64 else (EFFICIENT,)
    is_hopper = case.capability >= HOPPER
    if case.masked:
        return (FUSED, EFFICIENT) if is_hopper else (EFFICIENT,)
    if case.drops:
        return (FLASH, EFFICIENT)
    return (FUSED, FLASH, EFFICIENT) if is_hopper else (FLASH, EFFICIENT)


def _refusal(case: AttentionCase, backend: str) -> str:
    """Why flash or fused cannot be had, or nothing."""
    if case.device_type != "cuda":
        if backend == FUSED:
            return f"is cuDNN's, which has no kernel for a {case.device_type} device"
        return f"drops no probabilities on a {case.device_type} device" if case.drops else ""
    if case.dtype not in _16_BITS:
        return f"computes in 16 bits, and the inputs are {str(case.dtype).removeprefix('torch.')}"
    if backend == FLASH and case.masked:
        return "takes no mask, such as that of padding"
    return ""


def reason_for(case: AttentionCase, backend: str = AUTO) -> str:
    """The reason for the choice, as a phrase for the log."""
    if backend != AUTO:
        return f"--attention-backend {backend}"
    said = [case.device_type, str(case.dtype).removeprefix("torch.")]
    if case.device_type == "cuda":
        said.append("compute capability {}.{}".format(*case.capability))
    said += ["with a mask"] if case.masked else []
    said += ["with dropout"] if case.drops else []
    return ", ".join(said)


def within(kernels: tuple[str, ...]) -> AbstractContextManager[object]:
    """Within the context torch's attention runs one of these kernels, the first that takes its inputs, or raises."""
    return sdpa_kernel([_TORCH[name] for name in kernels], set_priority=True)


def case_of(q: torch.Tensor, *, capability: tuple[int, int], masked: bool, drops: bool) -> AttentionCase:
    """That of a call with such queries."""
    return AttentionCase("cuda" if q.is_cuda else q.device.type, q.dtype, capability, masked, drops)


_NEWER_FLASH = MappingProxyType({9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")})
"""By the first number of the capability: the implementation as torch names it, and the module that has it."""


def newest_flash(capability: tuple[int, int]) -> str | None:
    """The FlashAttention made for such a device, if torch knows it and its package is installed; else torch's own
    FlashAttention-2 runs."""
    name, module = _NEWER_FLASH.get(capability[0], ("", ""))
    known = vars(torch_attention).get("list_flash_attention_impls", list)()  # torch 2.10 does not have it
    return name if name in known and _is_installed(module) else None


def _is_installed(module: str) -> bool:
    package = module.partition(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


def activate_flash(name: str) -> None:
    """Let torch's flash kernel be this one, for the whole process."""
    torch_attention.activate_flash_attention_impl(name)
