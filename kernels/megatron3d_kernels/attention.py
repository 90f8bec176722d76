"""The attention core, softmax(q k^T / sqrt(D)) v: torch's, which picks a fused kernel where it has one; on CPU with
another backward where that is faster (`causal_blocks.py`).

Shapes: B micro-batch, N query heads, G key and value heads, S queries, T keys, D head size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron3d_kernels.causal_blocks import causal_blocks, suits_blocks


def attention(
    q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, mask: Tensor | None, probability: float, is_causal: bool
) -> Tensor:
    """[B, N, S, D]; each key and value head serves N / G neighbouring query heads.

    Args:
        q_BNSD: queries.
        k_BGTD: keys.
        v_BGTD: values.
        mask: bool, broadcast to [B, N, S, T], True where a query may attend; None with `is_causal` or for all.
        probability: that a weight is dropped, drawn from the global generator of the device.
        is_causal: whether query s attends to keys 0 .. s alone.
    """
    plain_causal = is_causal and mask is None and probability == 0
    if plain_causal and q_BNSD.device.type == "cpu" and suits_blocks(q_BNSD, k_BGTD, v_BGTD):
        return causal_blocks(q_BNSD, k_BGTD, v_BGTD)
    return F.scaled_dot_product_attention(
        q_BNSD,
        k_BGTD,
        v_BGTD,
        attn_mask=mask,
        dropout_p=probability,
        is_causal=is_causal,
        enable_gqa=q_BNSD.shape[1] != k_BGTD.shape[1],
    )
