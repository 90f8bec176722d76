"""The attention core, softmax(q k^T / sqrt(D)) v, without its projections.

Without dropout it is torch's `scaled_dot_product_attention`, which never holds the probabilities. Dropout of
probabilities by place (`dropout.py`) needs them, so with dropout the core is composed of two products and a softmax.
On CUDA devices the probabilities of long sequences would not fit; there torch's fused kernels draw masks of their own,
which a layout changes (`draws_by_place`).

Packed documents are causal squares of the scores (`documents.py`). Where probabilities are dropped, each is a core of
its own, whose queries and keys stand where they do in the sample.

Source: Vaswani et al. 2017, section 3.2.1; Dao et al. 2022 for the fused kernels.

Shapes: S queries, T keys, B micro-batch, N query heads, G key and value heads (N and G are this rank's), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import sqrt

import torch
from megatron3d_kernels.dropout import keep_mask, kept_scale
from megatron3d_kernels.rectangles import Plan
from megatron3d_kernels.registry import Registry
from torch import Tensor

from megatron3d.nn.dropout import DropoutStream, attention_keys
from megatron3d.params.streams import stream_seed

_DEFAULT_KERNELS = Registry()


@dataclass(frozen=True)
class Masking:
    """Who attends to whom: where `mask_BST` is True ([B, S or 1, T]), or, without a mask, all to all or, if
    `is_causal`, each query to the keys up to its own. `rectangles` of the scores take the place of both."""

    mask_BST: Tensor | None
    is_causal: bool
    rectangles: Plan | None = None


@dataclass(frozen=True)
class ProbabilityDropout:
    """Dropout of attention probabilities.

    Attributes:
        probability: above 0, below 1.
        stream: of the micro-batch.
        site: name of the place in the model.
        first_head: number in the whole model of this rank's first query head.
        shard: number of this rank among those that share the heads.
        first_position: where the first query and the first key stand in their sample.
    """

    probability: float
    stream: DropoutStream
    site: str
    first_head: int
    shard: int
    first_position: int = 0


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
    if masking.rectangles is None:
        return _attend(q_BNSD, k_BGTD, v_BGTD, masking, dropout, kernels=kernels)
    if dropout is None:
        return kernels.rectangle_attention(q_BNSD, k_BGTD, v_BGTD, masking.rectangles)
    return _of_squares((q_BNSD, k_BGTD, v_BGTD), masking.rectangles, dropout, kernels=kernels)


def _of_squares(
    q_k_v: tuple[Tensor, Tensor, Tensor], plan: Plan, dropout: ProbabilityDropout, *, kernels: Registry
) -> Tensor:
    """Of causal squares that follow each other and cover their samples, one after another."""
    num_samples, first_sample = len(q_k_v[0]), dropout.stream.first_sample
    of_samples = []
    for sample in range(num_samples):
        of_sample = replace(dropout, stream=replace(dropout.stream, first_sample=first_sample + sample))
        parts = []
        for square in plan[sample if len(plan) > 1 else 0]:
            assert square.is_causal and square.queries == square.keys, f"{square} is no document"
            own = (slice(sample, sample + 1), slice(None), slice(square.queries.start, square.queries.stop))
            q_BNRD, k_BGRD, v_BGRD = (x[own] for x in q_k_v)
            of_square = replace(of_sample, first_position=square.queries.start)
            parts.append(_attend(q_BNRD, k_BGRD, v_BGRD, Masking(None, True), of_square, kernels=kernels))
        of_samples.append(torch.cat(parts, dim=2))
    return torch.cat(of_samples)


def _attend(
    q_BNSD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    masking: Masking,
    dropout: ProbabilityDropout | None,
    *,
    kernels: Registry,
) -> Tensor:
    mask = None if masking.mask_BST is None else masking.mask_BST.unsqueeze(1)
    fused = partial(kernels.attention, q_BNSD, k_BGTD, v_BGTD, mask=mask, is_causal=mask is None and masking.is_causal)
    if dropout is None:
        return fused(probability=0.0)
    if draws_by_place(q_BNSD.device.type):
        return _composed(q_BNSD, k_BGTD, v_BGTD, masking, dropout)
    # The fused kernels draw from the global generator: give it the stream of this place, then put it back.
    stream = dropout.stream
    with torch.random.fork_rng(devices=[q_BNSD.device]):
        place = (dropout.site, stream.first_sample, dropout.shard, dropout.first_position)
        torch.manual_seed(stream_seed(stream.seed, *place))
        return fused(probability=dropout.probability)


def _composed(q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, masking: Masking, dropout: ProbabilityDropout) -> Tensor:
    """All in fp32 at least, also where the inputs are narrower; the result has their dtype."""
    samples, heads, queries, size = q_BNSD.shape
    first = dropout.first_position
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
        positions_S=torch.arange(first, first + queries, device=q_BNSD.device),
    )
    keep_BNST = keep_mask(keys_BNS, k_BNTD.shape[2], dropout.probability, first=first)
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
