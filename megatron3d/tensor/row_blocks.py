"""Lookups in and products with a table whose rows come in blocks, so that the whole of it is never on a rank.

A lookup adds up what each block holds of the rows that are looked up. A product with the table as output layer makes
the columns of each block in turn; its backward passes the blocks again, for the gradient of the input, and the sink
passes blocks of buffers for that of the table. The blocks of weights are gathered one ahead of the one in use, those
of gradients are reduced behind it (`params/row_blocks.py`).

Shapes: S sequence, B micro-batch, T tokens, H hidden, R rows of this rank's shard of the table, made up so that the
ranks that share its state own equally many; N rows of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron3d_kernels.registry import Registry
from torch import Tensor, nn

from megatron3d.comm.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from megatron3d.params.row_blocks import BlockedTable
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import InputType


def lookup(rows_T: Tensor, blocks: BlockedTable) -> Tensor:
    """The rows [T, H] of a table, without autograd: each is in one block, and the others add zeros."""
    found_TH: Tensor | None = None
    for block, weight_NH in blocks.weights():
        position_T, elsewhere_T = block.positions(rows_T)
        held_TH = weight_NH.index_select(0, position_T).masked_fill_(elsewhere_T.unsqueeze(-1), 0.0)
        found_TH = held_TH if found_TH is None else found_TH.add_(held_TH)
    assert found_TH is not None, "a table has blocks"
    return found_TH


class _LinearByBlocks(torch.autograd.Function):
    """`tensor.linear._Linear` with a table in blocks, whose bias may have fewer elements than there are columns."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: nn.Parameter,
        bias: nn.Parameter | None,
        blocks: BlockedTable,
        context: LayerContext,
        input_type: InputType,
    ) -> Tensor:
        ctx.save_for_backward(x if table.requires_grad else None)
        ctx.table, ctx.bias, ctx.blocks, ctx.context, ctx.input_type = table, bias, blocks, context, input_type
        gathered = start_all_gather(x, context.tp).wait() if input_type == "V" else x
        return scores_of_blocks(gathered, bias, blocks, context.kernels)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        context: LayerContext = ctx.context
        gathering = start_all_gather(x, context.tp) if ctx.input_type == "V" and x is not None else None
        grad_in, reducing = None, None
        if ctx.needs_input_grad[0]:
            grad_in = input_gradient_of_blocks(grad_out, ctx.blocks, context.kernels)
            if ctx.input_type == "V":
                reducing = start_reduce_scatter(grad_in, context.tp)
            elif ctx.input_type == "I":
                reducing = start_all_reduce(grad_in, context.tp)
        gathered = gathering.wait() if gathering else x
        context.sink.add_linear(ctx.table, None, grad_out, gathered, kernels=context.kernels)
        if ctx.bias is not None:
            context.sink.add_linear(ctx.table, ctx.bias, grad_out[..., : ctx.bias.numel()], None)
        return (reducing.wait() if reducing else grad_in), None, None, None, None, None


def scores_of_blocks(x: Tensor, bias: Tensor | None, blocks: BlockedTable, kernels: Registry) -> Tensor:
    """x W^T + b without autograd and without communication on the tensor axis: [..., H] to [..., R]."""
    y = x.new_empty((*x.shape[:-1], blocks.num_rows))
    for block, weight_NH in blocks.weights():
        columns = block.columns_of(y)
        columns.copy_(kernels.linear(x, weight_NH, None).view(columns.shape))
    if bias is not None:
        y[..., : bias.numel()].add_(bias)
    return y


def input_gradient_of_blocks(grad_out: Tensor, blocks: BlockedTable, kernels: Registry) -> Tensor:
    """The sum over the blocks, in fp32, of the product of their columns [..., N] with their weights: [..., H]."""
    total: Tensor | None = None
    for block, weight_NH in blocks.weights():
        product = kernels.input_gradient(block.columns_of(grad_out).flatten(-2), weight_NH)
        total = product.to(_at_least_fp32(product.dtype)) if total is None else total.add_(product)
    assert total is not None, "a table has blocks"
    return total.to(grad_out.dtype)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def linear_by_blocks(
    x: Tensor,
    table: nn.Parameter,
    bias: nn.Parameter | None,
    *,
    blocks: BlockedTable,
    context: LayerContext,
    input_type: InputType,
) -> Tensor:
    """x W^T + b with a table W in blocks, whose gradients go to the sink of the context.

    Args:
        x: [..., H] of type `input_type`; see `tensor.linear.linear`.
        table: the parameter.
        bias: [R] or fewer, for the first columns; or None.
        blocks: the weights of the table.
        context: the axis, the sink and the kernels.
        input_type: see `tensor.linear.linear`.

    Returns:
        [..., R] with the whole S; the columns of rows that pad the shard are 0.
    """
    return _LinearByBlocks.apply(x, table, bias, blocks, context, input_type)
