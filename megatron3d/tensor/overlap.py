"""Products of tensor-parallel layers in chunks of positions, so that one chunk travels while another is multiplied.

A product needs its input gathered, or its result summed, over the tensor axis. Whole, one waits for the other. In
chunks only the first gather and the last sum are waited for:

    gather and multiply     gather 0 | gather 1, product 0 | gather 2, product 1 | ... | product n
    multiply and reduce     product 0 | sum 0, product 1 | sum 1, product 2 | ... | sum n

Under sequence parallelism chunk c is the same positions of every rank's shard, which do not lie one after another in
the whole sequence; products read and write them where they are. At most two chunks of a gathered input or of a result
to be scattered exist at a time. Sums over ranks are those of the whole tensor, element by element.

Every chunk is started before the product it runs beside is. On CUDA a collective begins when the kernels launched
before its start are done, and `wait` makes the current stream wait, not the host.

Not here: the backward of a column-parallel layer whose weight gradient is made at once (`linear.py`), where each of its
two collectives already runs beside a whole product; experts, tables in blocks, the loss in chunks.

Source: Wang et al. 2023 (ASPLOS, "Overlap communication with dependent computation via decomposition"), sections 5.1
and 5.2; there and in Transformer Engine the shards of ranks are the chunks, passed round a ring.

Shapes: S sequence, L local sequence (S / tp under sequence parallelism, else S), B micro-batch, I input and O output
features; R blocks of rows that lie apart, T rows of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron3d.comm.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from megatron3d.tensor.context import LayerContext

Multiply = Callable[[Tensor, Tensor], None]
"""Writes a product into its first argument, [R, T, O], made of the second, [R, T, I]."""


def gather_and_multiply(x_LBI: Tensor, width: int, multiply: Multiply, context: LayerContext) -> Tensor:
    """The product [S, B, width] with the input [L, B, I] of all ranks, in a forward: what is gathered is kept for a
    recomputation that reuses communication."""

    def start(x_CBI: Tensor, _: int) -> Pending:
        return context.replay.start(lambda: start_all_gather(x_CBI, context.tp))

    return _multiply_arriving(x_LBI, width, multiply, context, start)


def gather_keep_and_multiply(
    x_LBI: Tensor, width: int, multiply: Multiply, context: LayerContext
) -> tuple[Tensor, Tensor]:
    """The same, and what was gathered, [S, B, I] in the order of `in_order_of_chunks`."""
    tp, length = context.tp, x_LBI.shape[0]
    gathered_SBI = x_LBI.new_empty((length * tp.size, *x_LBI.shape[1:]))
    chunks_of_all = gathered_SBI.split([size * tp.size for size in chunk_lengths(length, context)])

    def start(x_CBI: Tensor, number: int) -> Pending:
        return start_all_gather(x_CBI, tp, into=chunks_of_all[number])

    return _multiply_arriving(x_LBI, width, multiply, context, start), gathered_SBI


def multiply_and_reduce(
    x_SBI: Tensor, width: int, multiply: Multiply, context: LayerContext, *, scatters: bool
) -> Tensor:
    """The product with [S, B, I] summed over the ranks: where it `scatters` the positions of this rank, [L, B, width],
    else all of them."""
    tp, num_blocks = context.tp, context.tp.size if scatters else 1
    y_LBO = x_SBI.new_empty((x_SBI.shape[0] // num_blocks, *x_SBI.shape[1:-1], width))
    lengths = chunk_lengths(y_LBO.shape[0], context)
    summing: Pending | None = None
    for x_RTI, y_CBO in zip(_row_blocks(x_SBI, num_blocks, lengths), y_LBO.split(lengths), strict=True):
        if scatters:
            partial_PBO = x_SBI.new_empty((y_CBO.shape[0] * num_blocks, *y_CBO.shape[1:]))  # C positions of R ranks
            multiply(partial_PBO.view(num_blocks, -1, width), x_RTI)
            started = start_reduce_scatter(partial_PBO, tp, into=y_CBO)
        else:
            multiply(y_CBO.view(1, -1, width), x_RTI)
            started = start_all_reduce(y_CBO, tp)
        if summing is not None:
            summing.wait()  # its partial sums are released, before more are made
        summing = started
    if summing is not None:
        summing.wait()
    return y_LBO


def in_order_of_chunks(x_SBI: Tensor, context: LayerContext) -> Tensor:
    """A copy of [S, B, I] with the positions of chunk 0 of every rank first, then those of chunk 1, and so on."""
    shards_RLBI = x_SBI.contiguous().unflatten(0, (context.tp.size, -1))
    lengths = chunk_lengths(shards_RLBI.shape[1], context)
    return torch.cat([of_rank for chunk_RCBI in shards_RLBI.split(lengths, 1) for of_rank in chunk_RCBI])


def chunk_lengths(length: int, context: LayerContext) -> list[int]:
    """How many of `length` positions each chunk has: as many chunks as asked for, none of them empty, of lengths that
    differ by one at most."""
    count = min(context.overlap_chunks, length)
    return [(number + 1) * length // count - number * length // count for number in range(count)]


def _multiply_arriving(
    x_LBI: Tensor, width: int, multiply: Multiply, context: LayerContext, start: Callable[[Tensor, int], Pending]
) -> Tensor:
    """`start` gathers a chunk, of which it gets the number too. While one is multiplied, the next is on its way."""
    size, lengths = context.tp.size, chunk_lengths(x_LBI.shape[0], context)
    y_SBO = x_LBI.new_empty((x_LBI.shape[0] * size, *x_LBI.shape[1:-1], width))
    chunks = x_LBI.split(lengths)
    coming = start(chunks[0], 0) if chunks else None
    for number, y_RTO in enumerate(_row_blocks(y_SBO, size, lengths)):
        arriving, coming = coming, start(chunks[number + 1], number + 1) if number + 1 < len(chunks) else None
        assert arriving is not None, f"chunk {number} of {len(chunks)} was started"
        multiply(y_RTO, arriving.wait().view(size, -1, x_LBI.shape[-1]))
    return y_SBO


def _row_blocks(x_SBI: Tensor, num_blocks: int, lengths: Sequence[int]) -> Sequence[Tensor]:
    """The rows of each chunk in the memory of [S, B, I]: its positions of the shard of each rank, [R, T, I]."""
    rows_RTI = x_SBI.contiguous().view(num_blocks, -1, x_SBI.shape[-1])
    rows_each = rows_RTI.shape[1] // max(1, sum(lengths))
    return rows_RTI.split([length * rows_each for length in lengths], 1)


class _RowLinear(torch.autograd.Function):
    """y = the sum over the ranks of x W^T. See `row_linear`."""

    @staticmethod
    def forward(ctx: Any, x_SBI: Tensor, weight: nn.Parameter, context: LayerContext) -> Tensor:
        ctx.save_for_backward(x_SBI if weight.requires_grad else None)
        ctx.weight, ctx.context = weight, context
        multiply = partial(context.kernels.linear_into, weight=weight, bias=None)
        scatters = context.sequence_parallel
        return context.replay.run(lambda: multiply_and_reduce(x_SBI, len(weight), multiply, context, scatters=scatters))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None, None]:
        (x_SBI,) = ctx.saved_tensors
        context: LayerContext = ctx.context
        weight, kernels, grad_in = ctx.weight, context.kernels, None
        if not context.sequence_parallel:
            if ctx.needs_input_grad[0]:
                grad_in = kernels.input_gradient(grad_out, weight)
        elif not ctx.needs_input_grad[0]:
            grad_out = start_all_gather(grad_out, context.tp).wait()
        else:
            multiply = partial(kernels.input_gradient_into, weight=weight)
            grad_in, grad_out = gather_keep_and_multiply(grad_out, weight.shape[1], multiply, context)
            x_SBI = None if x_SBI is None else in_order_of_chunks(x_SBI, context)
        context.sink.add_linear(weight, None, grad_out, x_SBI, kernels=kernels)
        return grad_in, None, None


def row_linear(x_SBI: Tensor, weight: nn.Parameter, context: LayerContext) -> Tensor:
    """x W^T summed over the ranks while it is made, with a gradient whose gather runs beside its product.

    Args:
        x_SBI: [S, B, I], this rank's input features of all positions.
        weight: [O, I], this rank's shard.
        context: the axis, the sink, the kernels, and the number of chunks.

    Returns:
        [L, B, O] of the type of the residual stream.
    """
    return _RowLinear.apply(x_SBI, weight, context)
