"""The attention core, softmax(q k^T / sqrt(D)) v, without its projections.

Without dropout it is torch's `scaled_dot_product_attention`, which never holds the probabilities. Dropout of
probabilities by place (`dropout.py`) needs them, so with dropout the core is composed of two products and a softmax.
On CUDA devices the probabilities of long sequences would not fit; there torch's fused kernels draw masks of their own,
which a layout changes (`draws_by_place`).

Source: Vaswani et al. 2017, section 3.2.1; Dao et al. 2022 for the fused kernels.

Shapes: S queries, T keys, B micro-batch, N query heads, G key and value heads (N and G are this rank's), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from megatron3d_kernels.dropout import keep_mask, kept_scale
from megatron3d_kernels.registry import Registry
from torch import Tensor

from megatron3d.nn.dropout import DropoutStream, attention_keys
from megatron3d.params.streams import stream_seed

_DEFAULT_KERNELS = Registry()


@dataclass(frozen=True)
class Masking:
    """Who attends to whom: where `mask_BST` is True ([B, S or 1, T]), or, without a mask, all to all or, if
    `is_causal`, each query to the keys up to its own."""

    mask_BST: Tensor | None
    is_causal: bool


@dataclass(frozen=True)
class ProbabilityDropout:
    """Dropout of attention probabilities.

    Attributes:
        probability: above 0, below 1.
        stream: of the micro-batch.
        site: name of the place in the model.
        first_head: number in the whole model of this rank's first query head.
        shard: number of this rank among those that share the heads.
    """

    probability: float
    stream: DropoutStream
    site: str
    first_head: int
    shard: int


def draws_by_place(device_type: str) -> bool:
    """Whether masks of attention probabilities are the same at every layout on such devices."""
    return device_type != "cuda"


def attend(
    q_BNSD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    masking: Masking,
    dropout: ProbabilityDropout | None = None,
    *,
    kernels: Registry = _DEFAULT_KERNELS,
) -> Tensor:
    """[B, N, S, D] of queries that stand at positions 0 .. S-1 wherever there is dropout."""
    mask = None if masking.mask_BST is None else masking.mask_BST.unsqueeze(1)
    fused = partial(kernels.attention, q_BNSD, k_BGTD, v_BGTD, mask=mask, is_causal=mask is None and masking.is_causal)
    if dropout is None:
        return fused(probability=0.0)
    if draws_by_place(q_BNSD.device.type):
        return _composed(q_BNSD, k_BGTD, v_BGTD, masking, dropout)
    # The fused kernels draw from the global generator: give it the stream of this place, then put it back.
    stream = dropout.stream
    with torch.random.fork_rng(devices=[q_BNSD.device]):
        torch.manual_seed(stream_seed(stream.seed, dropout.site, stream.first_sample, dropout.shard))
        return fused(probability=dropout.probability)


def _composed(q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, masking: Masking, dropout: ProbabilityDropout) -> Tensor:
    """All in fp32 at least, also where the inputs are narrower; the result has their dtype."""
    samples, heads, queries, size = q_BNSD.shape
    wide = torch.promote_types(q_BNSD.dtype, torch.float32)
    k_BNTD, v_BNTD = (_for_each_head(x.to(wide), heads) for x in (k_BGTD, v_BGTD))
    scores_BNST = (q_BNSD.to(wide) / sqrt(size)) @ k_BNTD.transpose(-2, -1)
    penalty = _penalty(masking, scores_BNST)
    if penalty is not None:
        scores_BNST.add_(penalty)
    keys_BNS = attention_keys(
        dropout.stream,
        site=dropout.site,
        num_samples=samples,
        heads_N=torch.arange(dropout.first_head, dropout.first_head + heads, device=q_BNSD.device),
        positions_S=torch.arange(queries, device=q_BNSD.device),
    )
    keep_BNST = keep_mask(keys_BNS, k_BNTD.shape[2], dropout.probability)
    y_BNSD = (scores_BNST.softmax(-1) * keep_BNST) @ v_BNTD
    return y_BNSD.mul_(kept_scale(dropout.probability)).to(q_BNSD.dtype)


def _for_each_head(x_BGTD: Tensor, heads: int) -> Tensor:
    """[B, N, T, D]: each key and value head for all query heads that share it, which are neighbours."""
    groups = x_BGTD.shape[1]
    return x_BGTD if groups == heads else x_BGTD.repeat_interleave(heads // groups, dim=1)


def _penalty(masking: Masking, scores_BNST: Tensor) -> Tensor | None:
    """What is added to scores, [S, T] or [B, 1, S or 1, T]: so much below 0 where a query may not attend that the
    probability is 0. It is finite, so that a query without any key gets numbers."""
    if masking.mask_BST is not None:
        barred = ~masking.mask_BST.unsqueeze(1)
    elif masking.is_causal:
        barred = torch.ones_like(scores_BNST[0, 0], dtype=torch.bool).triu(1)
    else:
        return None
    zeros = torch.zeros(barred.shape, dtype=scores_BNST.dtype, device=scores_BNST.device)
    return zeros.masked_fill_(barred, torch.finfo(scores_BNST.dtype).min)
