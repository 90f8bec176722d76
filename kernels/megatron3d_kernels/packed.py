"""Packed documents on CUDA: the squares of a micro-batch in one call of a kernel for sequences of various lengths.

The kernel is torch's (`torch.nn.attention.varlen`), or that of the package flash-attn where it is asked for. They are
for 16-bit dtypes; other dtypes and other plans go rectangle by rectangle (`rectangles.py`). All give the same up to
rounding. No CUDA device has run this yet: tests hold the packing against the formula with a stand-in for the kernel,
and those marked `gpu` the kernel itself.

Shapes: B micro-batch, N query heads, G key and value heads, S positions, D head size, T = B x S.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from itertools import accumulate, chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron3d_kernels.launch import KernelError, sent
from megatron3d_kernels.rectangles import Plan, Rectangle

TORCH, FLASH_ATTN = "torch", "flash-attn"

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""Queries [T, N, D], keys and values [T, G, D], bounds of documents among T (int32), and the length of the longest, to
causal attention within each, [T, N, D]."""


def require_packed(name: str) -> str:
    """The kernel's name if it is one that can be used here; raises KernelError if it is not."""
    if name not in KERNELS:
        raise KernelError(f"There is no kernel {name!r} for packed documents; use one of {', '.join(KERNELS)}.")
    if name == FLASH_ATTN and find_spec("flash_attn") is None:
        raise KernelError("Packed documents by 'flash-attn' need the package flash-attn; install it, or use 'torch'.")
    return name


def suits_packed(q_BNSD: Tensor, plan: Plan) -> bool:
    """Whether the kernel takes such tensors, and the plan is documents that cover every sample."""
    if not q_BNSD.is_cuda or q_BNSD.dtype not in (torch.float16, torch.bfloat16):
        return False
    return all(_are_documents(rectangles, q_BNSD.shape[2]) for rectangles in plan)


def packed_attention(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, plan: Plan, *, kernel: str = TORCH) -> Tensor:
    """Causal attention within each document, [B, N, S, D], by the kernel of this name."""
    samples, _, length, _ = q_BNSD.shape
    of_samples = plan if len(plan) == samples else [plan[0]] * samples
    lengths = [len(document.queries) for document in chain.from_iterable(of_samples)]
    bounds = sent(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), q_BNSD.device)
    q_TND, k_TGD, v_TGD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNSD, k_BGSD, v_BGSD))
    y_TND = KERNELS[kernel](q_TND, k_TGD, v_TGD, bounds, max(lengths))
    return y_TND.unflatten(0, (samples, length)).transpose(1, 2)


def _by_torch(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, bounds: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # more than a second that only CUDA runs need

    options: dict[str, Any] = {"window_size": (-1, 0)}
    times = q_TND.shape[1] // k_TGD.shape[1]
    if times > 1 and "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif times > 1:  # torch 2.11 does not share heads
        k_TGD, v_TGD = (x.repeat_interleave(times, dim=1) for x in (k_TGD, v_TGD))
    y_TND = varlen_attn(q_TND, k_TGD, v_TGD, bounds, bounds, longest, longest, **options)
    assert isinstance(y_TND, Tensor), "nothing but the output is asked for"
    return y_TND


def _by_flash_attn(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, bounds: Tensor, longest: int) -> Tensor:
    flash_attn = import_module("flash_attn")  # which only those who ask for it have installed
    return flash_attn.flash_attn_varlen_func(q_TND, k_TGD, v_TGD, bounds, bounds, longest, longest, causal=True)


KERNELS: Mapping[str, Kernel] = MappingProxyType({TORCH: _by_torch, FLASH_ATTN: _by_flash_attn})


def _are_documents(rectangles: Sequence[Rectangle], length: int) -> bool:
    position = 0
    for one in rectangles:
        if not one.is_causal or one.queries != one.keys or (one.queries and one.queries.start != position):
            return False
        position += len(one.queries)
    return position == length
