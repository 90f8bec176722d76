"""Projection to the vocabulary and cross-entropy in chunks of positions, so that no more logits than a chunk's exist.

The forward makes the logits of a chunk, takes three numbers a position from them (`loss.py`), and drops them; one
collective joins the numbers of all positions. The backward makes the logits of a chunk again and with them its
gradient, of which it takes the gradient of the input and of the table before the next chunk. The products are those
of `tensor.linear` with one more, the second one for the logits; communication on the tensor axis is the same. A
backward that defers its weight gradients keeps no gradient of logits until then: the weight-gradient step makes them
once more. In fp32 a single chunk gives the bits of the loss without chunks.

A table that comes in blocks (`row_blocks.py`) is gathered for each chunk, and its gradient reduced after each.

Source: Hsu et al. 2024 (arXiv:2410.10989, Liger Kernel), section 3.2, which makes the gradient in the forward; why that
does not fit here is in docs/decisions/0039-loss-in-chunks.md.

Shapes: S sequence (local under sequence parallelism), B micro-batch, H hidden, T rows of the gathered input, C those
of a chunk, V this rank's columns of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.comm.collectives import all_gather, start_all_gather, start_all_reduce, start_reduce_scatter
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.embedding import VocabParallelEmbedding
from megatron3d.tensor.linear import InputType
from megatron3d.tensor.row_blocks import input_gradient_of_blocks, scores_of_blocks


@dataclass(frozen=True)
class ChunkedProjection:
    """How hidden vectors become losses.

    Attributes:
        table: its rows are projected with.
        bias: [Vp/tp] or None.
        context: axis, sink, kernels and gate.
        input_type: of the hidden vectors on the tensor axis; see `tensor.linear.linear`.
        num_chunks: equal on all ranks that share the state of the table.
        place: where the gate opens for the table.
    """

    table: VocabParallelEmbedding
    bias: nn.Parameter | None
    context: LayerContext
    input_type: InputType
    num_chunks: int
    place: str = "head"

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """The rows of each chunk, which may be none where there are fewer rows than chunks."""
        for number in range(self.num_chunks):
            yield slice(number * num_rows // self.num_chunks, (number + 1) * num_rows // self.num_chunks)

    def gathered(self, x: Tensor) -> Tensor:
        """All rows [T, H] of the input."""
        gathered = start_all_gather(x, self.context.tp).wait() if self.input_type == "V" else x
        return gathered.reshape(-1, gathered.shape[-1])

    def logits(self, x_CH: Tensor) -> Tensor:
        """This rank's logits [C, V]; of a table in blocks with some columns more at the end."""
        weight, kernels = self.table.weight, self.context.kernels
        blocks = self.context.gate.blocks_of(weight)
        if blocks is None:
            return kernels.linear(x_CH, weight, self.bias)
        return scores_of_blocks(x_CH, self.bias, blocks, kernels)

    def input_gradient(self, grad_CV: Tensor) -> Tensor:
        """This rank's contribution [C, H] to the gradient of the input."""
        weight, kernels = self.table.weight, self.context.kernels
        blocks = self.context.gate.blocks_of(weight)
        if blocks is None:
            return kernels.input_gradient(grad_CV, weight)
        return input_gradient_of_blocks(grad_CV, blocks, kernels)

    def add_weight_gradient(self, grad_CV: Tensor, x_CH: Tensor) -> None:
        """Hand the gradients of table and bias of one chunk to the sink."""
        sink, kernels, weight, bias = self.context.sink, self.context.kernels, self.table.weight, self.bias
        sink.add_linear(weight, None, grad_CV, x_CH if weight.requires_grad else None, kernels=kernels)
        if bias is not None:
            sink.add_linear(weight, bias, grad_CV[..., : bias.numel()], None, kernels=kernels)

    @property
    def trains(self) -> bool:
        """Whether the table or the bias has a gradient."""
        return self.table.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


@dataclass(frozen=True)
class _Rows:
    """What the backward knows of each row of the gathered input, [T] each but for the input."""

    x_TH: Tensor
    target_T: Tensor
    own_max_T: Tensor
    sum_from_own_T: Tensor
    target_logit_T: Tensor
    grad_T: Tensor

    def logit_gradients(self, projection: ChunkedProjection) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each chunk and the gradient of its logits, in their place."""
        table = projection.table
        for rows in projection.chunks(len(self.target_T)):
            logits_CV = projection.logits(self.x_TH[rows])
            grad_CV = projection.context.kernels.cross_entropy_backward(
                logits_CV,
                self.target_T[rows],
                self.own_max_T[rows],
                self.sum_from_own_T[rows],
                self.target_logit_T[rows],
                self.grad_T[rows],
                vocab_start=table.first_row,
                num_valid=table.num_valid_rows,
                in_place=True,
            )
            del logits_CV
            yield rows, grad_CV
            del grad_CV  # before the next chunk's is made


class _ChunkedLoss(torch.autograd.Function):
    """Loss of each row, and whether no logit of its exceeds the target's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        target_T: Tensor,
        projection: ChunkedProjection,
    ) -> tuple[Tensor, Tensor]:
        own_3T = _softmax_sums(projection.gathered(x), target_T, projection)
        every_R3T = all_gather(own_3T.unsqueeze(0), projection.context.tp)
        own_max_T, (max_RT, sum_exp_RT, target_logit_RT) = own_3T[0], every_R3T.unbind(1)
        max_T, target_logit_T = max_RT.amax(0), target_logit_RT.sum(0)
        sum_exp_T = (sum_exp_RT * (max_RT - max_T).exp()).sum(0)
        sum_from_own_T = sum_exp_T * (max_T - own_max_T).exp()
        ctx.save_for_backward(x, target_T, own_max_T, sum_from_own_T, target_logit_T)
        ctx.projection = projection
        hits_T = (target_logit_T >= max_T).float()
        ctx.mark_non_differentiable(hits_T)
        return sum_exp_T.log() + max_T - target_logit_T, hits_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, target_T, own_max_T, sum_from_own_T, target_logit_T = ctx.saved_tensors
        projection: ChunkedProjection = ctx.projection
        rows = _Rows(projection.gathered(x), target_T, own_max_T, sum_from_own_T, target_logit_T, grad_T)
        grad_TH = torch.empty_like(rows.x_TH) if ctx.needs_input_grad[0] else None
        _differentiate(rows, projection, grad_TH)
        if grad_TH is None:
            return None, None, None, None, None
        tp = projection.context.tp
        if projection.input_type == "V":
            grad = start_reduce_scatter(grad_TH.view(-1, *x.shape[1:]), tp).wait()
        elif projection.input_type == "I":
            grad = start_all_reduce(grad_TH, tp).wait().view(x.shape)
        else:
            grad = grad_TH.view(x.shape)
        return grad, None, None, None, None


def _softmax_sums(x_TH: Tensor, target_T: Tensor, projection: ChunkedProjection) -> Tensor:
    """Maximum, sum of exponentials and target's logit of this rank's columns, [3, T]."""
    table, kernels = projection.table, projection.context.kernels
    found: Tensor | None = None
    for rows in projection.chunks(len(target_T)):
        logits_CV = projection.logits(x_TH[rows])
        own = kernels.local_softmax_sums(
            logits_CV, target_T[rows], table.first_row, table.num_valid_rows, overwrite=True
        )
        del logits_CV  # before the next chunk's are made
        if found is None:
            found = own[0].new_empty(3, len(target_T))
        for numbers_T, numbers_C in zip(found, own, strict=True):
            numbers_T[rows] = numbers_C
    assert found is not None, "there is a chunk"
    return found


def _differentiate(rows: _Rows, projection: ChunkedProjection, grad_TH: Tensor | None) -> None:
    """Fill the gradient of the input, if there is to be one, and hand over those of the weights, now or later."""
    sink = projection.context.sink
    if sink.defers:
        if grad_TH is not None:
            for chunk, grad_CV in rows.logit_gradients(projection):
                grad_TH[chunk] = projection.input_gradient(grad_CV)
                del grad_CV
        if projection.trains:
            sink.add_later(lambda: _add_weight_gradients(rows, projection))
        return
    with sink.joined():
        for chunk, grad_CV in rows.logit_gradients(projection):
            if grad_TH is not None:
                grad_TH[chunk] = projection.input_gradient(grad_CV)
            projection.add_weight_gradient(grad_CV, rows.x_TH[chunk])
            del grad_CV


@torch.no_grad()
def _add_weight_gradients(rows: _Rows, projection: ChunkedProjection) -> None:
    """The weight-gradient step, whose gate is closed."""
    context = projection.context
    with context.gate.reading(projection.place), context.sink.joined():
        for chunk, grad_CV in rows.logit_gradients(projection):
            projection.add_weight_gradient(grad_CV, rows.x_TH[chunk])
            del grad_CV


def chunked_cross_entropy(x: Tensor, target: Tensor, projection: ChunkedProjection) -> tuple[Tensor, Tensor]:
    """Loss of every row of `x`, and 1.0 where no logit of the whole vocabulary exceeds the target's, else 0.0.

    Args:
        x: [S, B, H] or [P, H], of the projection's type.
        target: token ids over the whole vocabulary, int64, of the shape of the gathered rows.
        projection: how the rows become losses.

    Returns:
        Two fp32 tensors of the shape of `target`, the same on all tensor-parallel ranks; the second has no gradient.
    """
    target_T = target.reshape(-1)
    loss_T, hits_T = _ChunkedLoss.apply(x, projection.table.weight, projection.bias, target_T, projection)
    return loss_T.view(target.shape), hits_T.view(target.shape)
