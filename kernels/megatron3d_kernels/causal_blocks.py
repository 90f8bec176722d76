"""Causal attention whose backward goes over blocks of keys in plain torch, for narrow dtypes on CPU.

torch's fused kernel computes the forward. Its backward multiplies small tiles, slowly for bf16 and short sequences.
Here the five products of the backward are batched ones in the dtype of the inputs. Scores are computed again block by
block, so nothing of size S x S is kept from the forward.

With L the log-sum-exp of a query's scores, o its output, g the gradient of that and D_q = sum(g * o), for each block
of keys and the queries at or after its first:

    P = exp(q k^T / sqrt(D) - L)      dv = P^T g      dS = P * (g v^T - D_q)      dk = dS^T q / sqrt(D)      dq += dS k

L and D_q are subtracted inside of the products: as further columns of q and g that meet ones in k and v. So what is
rounded to the narrow dtype is the logarithm of a probability, which is small where the probability matters, and only
two elementwise passes over a block are left.

Source: Dao et al. 2022 (FlashAttention, arXiv:2205.14135), appendix B.2, for the backward from L and D_q.

Shapes: B micro-batch, N query heads, G key and value heads, S queries and keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = {torch.bfloat16: 512}
"""By dtype on CPU, the longest sequence for which this backward takes less time than the fused kernel's; fp32 gains
nothing at any length (`tools/bench/attention.py`)."""

KEY_BLOCK = 256
BLOCK_ELEMENTS = 1 << 20
"""Probabilities that a block holds at once (2 MiB in bf16), unless one sample needs more."""

_EXTRA = 16
"""Further columns of the widened operands: two for a number in two parts, then zeros, as matrix units take columns by
the dozen."""


def suits_blocks(q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> bool:
    """Whether causal attention of such tensors on a CPU should go this way: its backward is wanted and is faster."""
    if not (torch.is_grad_enabled() and (q_BNSD.requires_grad or k_BGTD.requires_grad or v_BGTD.requires_grad)):
        return False
    return q_BNSD.shape[2] == k_BGTD.shape[2] and is_faster_over_blocks(q_BNSD)


def is_faster_over_blocks(q_BNSD: Tensor) -> bool:
    """Whether the backward of causal attention is faster on a CPU for queries of this dtype and number."""
    return q_BNSD.shape[2] <= LONGEST.get(q_BNSD.dtype, 0)


def causal_blocks(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, [B, N, S, D], each query attending to the keys up to its own.

    Each key and value head serves N / G neighbouring query heads. All on a CPU (or the meta device), one dtype.
    """
    return _CausalBlocks.apply(q_BNSD, k_BGSD, v_BGSD)


class _CausalBlocks(torch.autograd.Function):
    """Keeps q, k, v, the output and one fp32 number a query and head, as the fused kernel does."""

    @staticmethod
    def forward(ctx: Any, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y_BNSD, log_sum_BNS = fused(q_BNSD, k_BGSD, v_BGSD, is_causal=True)
        ctx.save_for_backward(q_BNSD, k_BGSD, v_BGSD, y_BNSD, log_sum_BNS)
        return y_BNSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return backward_over_blocks(grad_BNSD, *ctx.saved_tensors)


def backward_over_blocks(
    grad_BNSD: Tensor,
    q_BNSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    y_BNSD: Tensor,
    log_sum_BNS: Tensor,
    *,
    hidden_SS: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from the output and the log-sum-exp of all scores of the queries, of which these may
    be a part. `hidden_SS` is True for scores that do not count, besides those of later keys."""
    gradients = torch.empty_like(q_BNSD), torch.empty_like(k_BGSD), torch.empty_like(v_BGSD)
    heads, size = q_BNSD.shape[1], q_BNSD.shape[3]
    q_BNSW = _widened(q_BNSD * (1 / sqrt(size)), -log_sum_BNS.unsqueeze(-1))
    g_BNSW = _widened(grad_BNSD, -(grad_BNSD.float() * y_BNSD).sum(-1, keepdim=True))
    k_BNSW, v_BNSW = (_widened(_for_each_head(x, heads), None) for x in (k_BGSD, v_BGSD))
    for some in _sample_groups(q_BNSD):
        widened = _Widened(*(x[some].flatten(0, 1) for x in (q_BNSW, k_BNSW, v_BNSW, g_BNSW)), size, hidden_SS)
        _backward_of_samples(widened, *(x[some] for x in gradients))
    return gradients


def _sample_groups(q_BNSD: Tensor) -> Iterator[slice]:
    """Slices of samples whose blocks stay below BLOCK_ELEMENTS, at least one sample each."""
    samples, heads, queries, _ = q_BNSD.shape
    step = max(1, BLOCK_ELEMENTS // max(1, heads * queries * min(KEY_BLOCK, queries)))
    return (slice(first, first + step) for first in range(0, samples, step))


@dataclass(frozen=True)
class _Widened:
    """The operands of some samples, [M, S, D + extra] with M = B * N and D the head size: queries times 1 / sqrt(D) and
    -L, keys and values with ones, gradients of the output with -D_q; and the scores that do not count."""

    q_MSW: Tensor
    k_MSW: Tensor
    v_MSW: Tensor
    g_MSW: Tensor
    head_size: int
    hidden_SS: Tensor | None


def _backward_of_samples(widened: _Widened, dq_BNSD: Tensor, dk_BGSD: Tensor, dv_BGSD: Tensor) -> None:
    """Fill the three gradients of some samples."""
    q_MSW, k_MSW, v_MSW, g_MSW = widened.q_MSW, widened.k_MSW, widened.v_MSW, widened.g_MSW
    size, length = widened.head_size, q_MSW.shape[1]
    q_MSD, k_MSD, g_MSD = (x[..., :size] for x in (q_MSW, k_MSW, g_MSW))
    dq_MSD: Tensor | None = None  # of the blocks so far; fp32 once it is a sum
    for first in range(0, length, KEY_BLOCK):
        keys, queries = slice(first, first + KEY_BLOCK), slice(first, length)
        p_MST = torch.bmm(q_MSW[:, queries], k_MSW[:, keys].transpose(1, 2)).exp_()
        p_MST[:, :KEY_BLOCK].tril_()
        if widened.hidden_SS is not None:
            p_MST.masked_fill_(widened.hidden_SS[queries, keys], 0.0)
        ds_MST = torch.bmm(g_MSW[:, queries], v_MSW[:, keys].transpose(1, 2)).mul_(p_MST)
        _write_of_groups(dv_BGSD[:, :, keys], torch.bmm(p_MST.transpose(1, 2), g_MSD[:, queries]))
        _write_of_groups(dk_BGSD[:, :, keys], torch.bmm(ds_MST.transpose(1, 2), q_MSD[:, queries]))
        of_block_MSD = torch.bmm(ds_MST, k_MSD[:, keys])
        if dq_MSD is None:
            dq_MSD = of_block_MSD if length <= KEY_BLOCK else of_block_MSD.float()
        else:
            dq_MSD[:, queries] += of_block_MSD
    if dq_MSD is not None:
        torch.mul(dq_MSD.view(dq_BNSD.shape), 1 / sqrt(size), out=dq_BNSD)


def _widened(x_BNSD: Tensor, number_BNS1: Tensor | None) -> Tensor:
    """[B, N, S, D + extra]: x, then a fp32 number a row in two parts that add up to it, or ones to meet them."""
    samples, heads, length, size = x_BNSD.shape
    wide = x_BNSD.new_zeros(samples, heads, length, size + _EXTRA)
    wide[..., :size] = x_BNSD
    if number_BNS1 is None:
        wide[..., size : size + 2] = 1
    else:
        high = number_BNS1.to(x_BNSD.dtype)
        wide[..., size : size + 1] = high
        wide[..., size + 1 : size + 2] = number_BNS1 - high
    return wide


def _write_of_groups(out_BGTD: Tensor, of_heads_MTD: Tensor) -> None:
    """Write [B * N, T, D], summed over the query heads that share a key or value head."""
    samples, groups, length, size = out_BGTD.shape
    by_group = of_heads_MTD.view(samples, groups, -1, length, size)
    out_BGTD.copy_(by_group.sum(2) if by_group.shape[2] > 1 else by_group.squeeze(2))


def _for_each_head(x_BGSD: Tensor, heads: int) -> Tensor:
    """[B, N, S, D]: each key or value head for all query heads that share it, which are neighbours."""
    groups = x_BGSD.shape[1]
    return x_BGSD if groups == heads else x_BGSD.repeat_interleave(heads // groups, dim=1)
