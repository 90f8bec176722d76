"""Torch's fused attention of one rectangle, as its two halves: output and log-sum-exp, and the gradients from them.

These are torch's own operators behind `scaled_dot_product_attention`, which has no public form that returns and takes
the log-sum-exp. By device and dtype: the flash operator for CPU (any floating dtype, masks, grouped heads), the flash
operator for CUDA (fp16, bf16), the memory-efficient one for CUDA (fp32, masks). CUDA ones want head sizes that 8
divides, so smaller ones are padded with zeros. For narrow dtypes on CPU the backward of short causal squares is
that over blocks (`causal_blocks.py`). The CUDA half has run on meta tensors alone, never yet on a device.

Shapes: B micro-batch, N query heads, G key and value heads, S queries, T keys, D head size.
"""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d_kernels.causal_blocks import backward_over_blocks, is_faster_over_blocks

_HEAD_MULTIPLE = 8  # of head sizes in the CUDA operators
_LOG_SUM_MULTIPLE = 32  # of the length to which the memory-efficient operator pads the log-sum-exp

Gradients = tuple[Tensor, Tensor, Tensor]


def forward(
    q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, is_causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + mask) v and the log-sum-exp [B, N, S] (fp32, or fp64 with q).

    Args:
        q_BNSD: queries, D contiguous.
        k_BGTD: keys, likewise.
        v_BGTD: values, likewise.
        is_causal: query i attends to keys 0 to i; S = T.
        mask: [S, S] in the dtype of q, added to the scores: -inf where a query does not attend, as to all later keys.
    """
    if not _on_cuda(q_BNSD):
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q_BNSD, k_BGTD, v_BGTD, is_causal=is_causal, attn_mask=mask)
    scale = 1 / sqrt(q_BNSD.shape[-1])
    q, k, v = (_padded(x) for x in (q_BNSD, k_BGTD, v_BGTD))
    if _takes_flash(q_BNSD, mask):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        y_BNSD, log_sum_BNS = flash(q, k, v, 0.0, is_causal, scale=scale)[:2]
    else:
        k, v = (_for_each_head(x, q.shape[1]) for x in (k, v))
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = None if mask is None else _bias(mask, q)
        y_BNSD, log_sum_BNS = efficient(q, k, v, bias, True, 0.0, is_causal, scale=scale)[:2]
    return y_BNSD[..., : q_BNSD.shape[-1]], log_sum_BNS[..., : q_BNSD.shape[2]]


def backward(
    grad_BNSD: Tensor,
    q_BNSD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    out_BNSD: Tensor,
    log_sum_BNS: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
) -> Gradients:
    """Gradients of q, k, v from the output and log-sum-exp of all scores of the queries, of which these may be a part;
    arguments as those and the results of `forward`."""
    if grad_BNSD.stride(-1) != 1:
        grad_BNSD = grad_BNSD.contiguous()
    if not _on_cuda(q_BNSD):
        saved = (grad_BNSD, q_BNSD, k_BGTD, v_BGTD, out_BNSD, log_sum_BNS)
        if (is_causal or mask is not None) and is_faster_over_blocks(q_BNSD):
            return backward_over_blocks(*saved, hidden_SS=None if mask is None else mask < 0)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return fused(*saved, 0.0, is_causal, attn_mask=mask)
    size, groups, scale = q_BNSD.shape[-1], k_BGTD.shape[1], 1 / sqrt(q_BNSD.shape[-1])
    grad, q, k, v, out = (_padded(x) for x in (grad_BNSD, q_BNSD, k_BGTD, v_BGTD, out_BNSD))
    no_seed = torch.zeros((), dtype=torch.int64, device=q.device)
    if _takes_flash(q_BNSD, mask):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_backward
        lengths = (None, None, q.shape[2], k.shape[2])
        saved = (grad, q, k, v, out, log_sum_BNS.contiguous())
        dq, dk, dv = flash(*saved, *lengths, 0.0, is_causal, no_seed, no_seed, scale=scale)
    else:
        k, v = (_for_each_head(x, q.shape[1]) for x in (k, v))
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        padded = F.pad(log_sum_BNS, (0, -log_sum_BNS.shape[-1] % _LOG_SUM_MULTIPLE))
        options = (no_seed, no_seed, 0.0, [True, True, True, False], is_causal)
        bias = None if mask is None else _bias(mask, q)
        dq, dk, dv, _ = efficient(grad, q, k, v, bias, out, padded, *options, scale=scale)
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq[..., :size], dk[..., :size], dv[..., :size]


def _on_cuda(q_BNSD: Tensor) -> bool:
    return q_BNSD.device.type == "cuda"


def _takes_flash(q_BNSD: Tensor, mask: Tensor | None) -> bool:
    return mask is None and q_BNSD.dtype in (torch.float16, torch.bfloat16)


def _padded(x_BNSD: Tensor) -> Tensor:
    return F.pad(x_BNSD, (0, -x_BNSD.shape[-1] % _HEAD_MULTIPLE))


def _bias(mask_ST: Tensor, q_BNSD: Tensor) -> Tensor:
    """[B, N, S, T] whose rows begin at multiples of 8 elements, as the memory-efficient operator wants them."""
    keys = mask_ST.shape[1]
    return _padded(mask_ST)[:, :keys].expand(*q_BNSD.shape[:2], -1, -1)


def _for_each_head(x_BGTD: Tensor, heads: int) -> Tensor:
    groups = x_BGTD.shape[1]
    return x_BGTD if groups == heads else x_BGTD.repeat_interleave(heads // groups, dim=1)
