"""Kernels on tensors without memory: what a CPU or a GPU would choose, as far as memory is concerned.

On a CPU attention is torch's fused kernel, which runs on the meta device but is not chosen there, or for narrow dtypes
the project's backward over blocks; where weights are dropped, torch composes the core of products and a softmax there
as here. On a GPU the fused kernel cannot run without
one, so what it allocates and keeps is written by hand: it keeps queries, keys, values, output, one fp32 number for each
query and head, and the mask in the dtype of the queries. In the backward it takes a buffer of the size of the queries,
and makes the gradients of shared keys and values for each query head before it adds them up. `test_recording.py` holds
it against the CPU's kernel. The Triton kernels are those of the project: a launch on the meta device is none.

Source: Dao et al. 2022 (FlashAttention), section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron3d_kernels.attention_backends import AUTO, LOCAL, UNFUSED, AttentionChoice
from megatron3d_kernels.causal_blocks import causal_blocks, suits_blocks
from megatron3d_kernels.cross_entropy import CHUNK_ELEMENTS
from megatron3d_kernels.launch import TritonSupport
from megatron3d_kernels.products import add_in_fp32, multiply_blocks
from megatron3d_kernels.rectangles import Plan
from megatron3d_kernels.registry import Registry
from megatron3d_kernels.selection import TRITON_NAME
from torch import Tensor

_ANY_ATTENTION = AttentionChoice()


class CpuKernels(Registry):
    """What runs on a CPU: the references, and torch's fused attention unless weights are dropped."""

    def attention(
        self,
        q_BNSD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        mask: Tensor | None,
        probability: float,
        is_causal: bool,
    ) -> Tensor:
        """[B, N, S, D]; the fused kernel has its mask in the dtype of the queries."""
        is_composed = self._attention.backend in (UNFUSED, LOCAL)
        if probability > 0 or is_composed:
            return super().attention(q_BNSD, k_BGTD, v_BGTD, mask=mask, probability=probability, is_causal=is_causal)
        suits = mask is None and is_causal and suits_blocks(q_BNSD, k_BGTD, v_BGTD)
        if suits and self._attention.backend == AUTO:
            return causal_blocks(q_BNSD, k_BGTD, v_BGTD)
        bias = None if mask is None else mask.to(q_BNSD.dtype)
        y_BNSD, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BNSD, k_BGTD, v_BGTD, attn_mask=bias, is_causal=is_causal
        )
        return y_BNSD

    def local_softmax_sums(
        self, logits: Tensor, target: Tensor, vocab_start: int, num_valid: int, *, overwrite: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of many rows those of the first alone: the others take in turn what these take."""
        num_rows = _rows_that_show_all(logits)
        if target.numel() <= num_rows:
            return super().local_softmax_sums(logits, target, vocab_start, num_valid, overwrite=overwrite)
        some = super().local_softmax_sums(
            logits.flatten(0, -2)[:num_rows], target.flatten()[:num_rows], vocab_start, num_valid, overwrite=overwrite
        )
        row_max, sum_exp, target_logit = (one.new_empty(logits.shape[:-1]) for one in some)
        return row_max, sum_exp, target_logit

    def cross_entropy_backward(
        self,
        logits: Tensor,
        target: Tensor,
        max: Tensor,
        sum_exp: Tensor,
        target_logit: Tensor,
        grad_loss: Tensor,
        *,
        vocab_start: int,
        num_valid: int,
        in_place: bool = False,
        overwritten: bool = False,
    ) -> Tensor:
        """Of many rows those of the first alone, as `local_softmax_sums`."""
        num_rows, rows = _rows_that_show_all(logits), (target, max, sum_exp, target_logit, grad_loss)
        shard = {"vocab_start": vocab_start, "num_valid": num_valid}
        if target.numel() <= num_rows:
            return super().cross_entropy_backward(logits, *rows, **shard, in_place=in_place, overwritten=overwritten)
        grad = logits if in_place and logits.is_contiguous() else logits.new_empty(logits.shape)
        some = (one.reshape(-1)[:num_rows] for one in rows)
        super().cross_entropy_backward(
            grad.flatten(0, -2)[:num_rows], *some, **shard, in_place=True, overwritten=overwritten
        )
        return grad


def _rows_that_show_all(logits: Tensor) -> int:
    """Rows of two of the chunks that the references work on."""
    return 2 * max(1, CHUNK_ELEMENTS // logits.shape[-1])


_LACKS_WIDE_SUMS = torch.__version__ < "2.12"
"""Whether torch refuses products into fp32 buffers of tensors without memory; they take none."""


class GpuKernels(Registry):
    """What runs on a GPU with Triton, whether Triton is here or not."""

    def __init__(self, *, attention: AttentionChoice = _ANY_ATTENTION) -> None:
        support = TritonSupport(installed=True, interpreted=False, detail="recorded")
        super().__init__(TRITON_NAME, support=support, attention=attention)

    def keeps_no_scores(self, q_BNSD: Tensor) -> bool:
        """As on a GPU."""
        return self._attention.backend not in (UNFUSED, LOCAL)

    def weight_gradient(self, grad_TO: Tensor, x_TI: Tensor) -> Tensor:
        """[O, I], without the copy that bf16 products take on a CPU."""
        return grad_TO.t() @ x_TI

    def linear_into(self, y_RTO: Tensor, x_RTI: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Where y is, without the results that bf16 products with a bias have on a CPU first."""
        multiply_blocks(y_RTO, x_RTI, weight.t(), bias)

    def add_weight_gradient(
        self, buffer_OI: Tensor, grad_TO: Tensor, x_TI: Tensor, *, overwrites: bool = False
    ) -> None:
        """Into a buffer of any dtype inside of the product, as on a GPU whose torch has that."""
        if buffer_OI.dtype == grad_TO.dtype:
            super().add_weight_gradient(buffer_OI, grad_TO, x_TI, overwrites=overwrites)
        elif not (buffer_OI.is_meta and _LACKS_WIDE_SUMS):
            add_in_fp32(buffer_OI, grad_TO, x_TI, overwrites=overwrites)

    def attention(
        self,
        q_BNSD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        mask: Tensor | None,
        probability: float,
        is_causal: bool,
    ) -> Tensor:
        """[B, N, S, D], as far as memory is concerned."""
        if self._attention.backend in (UNFUSED, LOCAL):
            return super().attention(q_BNSD, k_BGTD, v_BGTD, mask=mask, probability=probability, is_causal=is_causal)
        return _Fused.apply(q_BNSD, k_BGTD, v_BGTD, mask)

    def rectangle_attention(self, q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, plan: Plan) -> Tensor:
        """[B, N, S, D] of packed documents, which a GPU computes in one call, as far as memory is concerned."""
        return _Fused.apply(q_BNSD, k_BGTD, v_BGTD, None)


class _Fused(torch.autograd.Function):
    """q [B, N, S, D], k and v [B, G, T, D] to [B, N, S, D] in the layout of the queries."""

    @staticmethod
    def forward(ctx: Any, q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, mask: Tensor | None) -> Tensor:
        y_BNSD = torch.empty_like(q_BNSD)
        sums_BNS = q_BNSD.new_empty(q_BNSD.shape[:3], dtype=torch.float32)
        bias = None if mask is None else mask.to(q_BNSD.dtype)
        ctx.save_for_backward(q_BNSD, k_BGTD, v_BGTD, y_BNSD, sums_BNS, bias)
        return y_BNSD

    @staticmethod
    def backward(ctx: Any, grad_BNSD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BNSD, k_BGTD, v_BGTD, *_ = ctx.saved_tensors
        buffers = [torch.empty_like(q_BNSD)]
        if q_BNSD.shape[1] != k_BGTD.shape[1]:
            buffers += [torch.empty_like(q_BNSD), torch.empty_like(q_BNSD)]
        grad_q, grad_k, grad_v = (torch.empty_like(one) for one in (q_BNSD, k_BGTD, v_BGTD))
        del buffers
        return grad_q, grad_k, grad_v, None
