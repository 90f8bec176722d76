"""Packed documents on CUDA: the squares of a micro-batch in one call of a kernel for sequences of various lengths.

The kernel is torch's (`torch.nn.attention.varlen`), for 16-bit dtypes; other dtypes and other plans go rectangle by
rectangle (`rectangles.py`). Both give the same up to rounding. No CUDA device has run this yet: tests hold the packing
against the formula with a stand-in for the kernel, and those marked `gpu` the kernel itself.

Shapes: B micro-batch, N query heads, G key and value heads, S positions, D head size, T = B x S.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from megatron3d_kernels.rectangles import Plan, Rectangle

Kernel = Callable[..., Any]


def suits_packed(q_BNSD: Tensor, plan: Plan) -> bool:
    """Whether the kernel takes such tensors, and the plan is documents that cover every sample."""
    if not q_BNSD.is_cuda or q_BNSD.dtype not in (torch.float16, torch.bfloat16):
        return False
    return all(_are_documents(rectangles, q_BNSD.shape[2]) for rectangles in plan)


def packed_attention(
    q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, plan: Plan, kernel: Kernel | None = None
) -> Tensor:
    """Causal attention within each document, [B, N, S, D]; `kernel` is torch's `varlen_attn` by default."""
    samples, heads, length, _ = q_BNSD.shape
    of_samples = plan if len(plan) == samples else [plan[0]] * samples
    lengths = [len(document.queries) for document in chain.from_iterable(of_samples)]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q_BNSD.device)
    q_TND, k_TGD, v_TGD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNSD, k_BGSD, v_BGSD))
    sizes = (bounds, bounds, max(lengths), max(lengths))
    options = {"window_size": (-1, 0), "enable_gqa": heads != k_BGSD.shape[1]}
    y_TND = (kernel or _torch_kernel())(q_TND, k_TGD, v_TGD, *sizes, **options)
    return y_TND.unflatten(0, (samples, length)).transpose(1, 2)


def _torch_kernel() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn  # a quarter of a second that only CUDA runs need

    return varlen_attn


def _are_documents(rectangles: Sequence[Rectangle], length: int) -> bool:
    position = 0
    for one in rectangles:
        if not one.is_causal or one.queries != one.keys or (one.queries and one.queries.start != position):
            return False
        position += len(one.queries)
    return position == length
