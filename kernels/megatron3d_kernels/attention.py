"""The attention core, softmax(q k^T / sqrt(D)) v, by one of torch's kernels (`attention_backends.py`); on CPU with
another backward where that is faster (`causal_blocks.py`).

Shapes: B micro-batch, N query heads, G key and value heads, S queries, T keys, D head size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron3d_kernels.attention_backends import (
    AUTO,
    EFFICIENT,
    FLASH,
    TITLES,
    AttentionChoice,
    case_of,
    kernels_for,
    within,
)
from megatron3d_kernels.causal_blocks import causal_blocks, suits_blocks
from megatron3d_kernels.launch import KernelError

_TORCH_CHOOSES = AttentionChoice()
_NONE_CAN = ("No available kernel", "No viable backend")
"""How torch begins where no kernel that may run takes the inputs."""


def attention(
    q_BNSD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    mask: Tensor | None,
    probability: float,
    is_causal: bool,
    choice: AttentionChoice = _TORCH_CHOOSES,
) -> Tensor:
    """[B, N, S, D]; each key and value head serves N / G neighbouring query heads.

    Args:
        q_BNSD: queries.
        k_BGTD: keys.
        v_BGTD: values.
        mask: bool, broadcast to [B, N, S, T], True where a query may attend; None with `is_causal` or for all.
        probability: that a weight is dropped, drawn from the global generator of the device.
        is_causal: whether query s attends to keys 0 .. s alone.
        choice: the kernels that may run.

    Raises KernelError where none of them takes the inputs.
    """
    if choice.backend == AUTO and not q_BNSD.is_cuda:
        plain_causal = is_causal and mask is None and probability == 0
        if plain_causal and q_BNSD.device.type == "cpu" and suits_blocks(q_BNSD, k_BGTD, v_BGTD):
            return causal_blocks(q_BNSD, k_BGTD, v_BGTD)
        return _torch(q_BNSD, k_BGTD, v_BGTD, mask, probability, is_causal)
    case = case_of(q_BNSD, capability=choice.capability, masked=mask is not None, drops=probability > 0)
    kernels = kernels_for(case, choice.backend)
    if q_BNSD.shape[1] != k_BGTD.shape[1] and EFFICIENT in kernels:  # which cannot share heads
        if FLASH in kernels:
            kernels = tuple(name for name in kernels if name != EFFICIENT)
        else:
            times = q_BNSD.shape[1] // k_BGTD.shape[1]
            k_BGTD, v_BGTD = (x.repeat_interleave(times, dim=1) for x in (k_BGTD, v_BGTD))
    try:
        with within(kernels):
            return _torch(q_BNSD, k_BGTD, v_BGTD, mask, probability, is_causal)
    except RuntimeError as error:
        if not str(error).startswith(_NONE_CAN):
            raise
        raise KernelError(
            f"Attention by {' or '.join(TITLES[name] for name in kernels)} takes no queries {tuple(q_BNSD.shape)} and "
            f"keys {tuple(k_BGTD.shape)} in {q_BNSD.dtype} on {q_BNSD.device}; use --attention-backend unfused, which "
            "holds all scores."
        ) from error


def _torch(
    q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, mask: Tensor | None, probability: float, is_causal: bool
) -> Tensor:
    return F.scaled_dot_product_attention(
        q_BNSD,
        k_BGTD,
        v_BGTD,
        attn_mask=mask,
        dropout_p=probability,
        is_causal=is_causal,
        enable_gqa=q_BNSD.shape[1] != k_BGTD.shape[1],
    )
