"""Vocabulary-parallel word embedding, and output layer: rows of the table cut over the tensor axis.

Each rank looks up the tokens it holds and contributes zeros for the others; the sum over the ranks is the embedding.
The vocabulary is padded so that it divides; the padding rows belong to no token and to no checkpoint.

Source: Shoeybi et al. 2019, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron3d.params.module import ParallelModule
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import InputType, linear, to_residual
from megatron3d.tensor.row_blocks import linear_by_blocks, lookup


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tp: int) -> int:
    """The smallest multiple of `divisible_by * tp` that holds the vocabulary."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


class _Lookup(torch.autograd.Function):
    """Rows of a table, whose gradients go to the sink row by row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: nn.Parameter, context: LayerContext) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.table, ctx.sink = table, context.sink
        blocks = context.gate.blocks_of(table)
        if blocks is None:
            return F.embedding(rows, table)
        return lookup(rows.flatten(), blocks).view(*rows.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, None, None]:
        (rows,) = ctx.saved_tensors
        ctx.sink.add_rows(ctx.table, rows.flatten(), grad_out.flatten(0, -2))
        return None, None, None


class VocabParallelEmbedding(ParallelModule):
    """The word-embedding table [V, H], also used as the output weight of tied models (then `tied_copy` on the last
    pipeline stage, whose table follows that of the first)."""

    weight: nn.Parameter

    def __init__(
        self,
        context: LayerContext,
        vocab_size: int,
        hidden_size: int,
        *,
        padded_size: int,
        init: Init,
        tied_copy: bool = False,
    ) -> None:
        super().__init__(tp=context.tp.size)
        self.context = context
        self.vocab_size = vocab_size
        self.rows_per_rank = padded_size // context.tp.size
        self.first_row = self.rows_per_rank * context.tp.rank
        self.declare(
            "weight",
            (vocab_size, hidden_size),
            init=init,
            decays=True,
            tp_dim=0,
            padded_size=padded_size,
            tied_copy=tied_copy,
            is_table=True,
        )

    @property
    def num_valid_rows(self) -> int:
        """Rows of this rank's shard that belong to a token; the rest is padding."""
        return max(0, min(self.vocab_size - self.first_row, self.rows_per_rank))

    def forward(self, tokens_SB: Tensor) -> Tensor:
        """Token ids [S, B] (int64, the whole S) to [S, B, H] on the residual stream."""
        row_SB = tokens_SB - self.first_row
        elsewhere_SB = (row_SB < 0) | (row_SB >= self.rows_per_rank)
        x_SBH = _Lookup.apply(row_SB.masked_fill(elsewhere_SB, 0), self.weight, self.context)
        if self.context.tp.size > 1:
            x_SBH = x_SBH.masked_fill(elsewhere_SB.unsqueeze(-1), 0.0)
        return to_residual(x_SBH, self.context)

    def scores(self, x: Tensor, bias: nn.Parameter | None = None, *, input_type: InputType, cuts_off: bool) -> Tensor:
        """x W^T + b, the logits of this rank's rows.

        Args:
            x: [S, B, H] or [P, H], of the type `input_type`; see `tensor.linear.linear`.
            bias: [Vp/tp] or None.
            input_type: see there.
            cuts_off: whether the result has columns of these rows alone. A table that comes in blocks may have some
                more, of rows that belong to no token; a loss leaves columns from `num_valid_rows` on out anyway, and
                wants the tensor whole.

        Returns:
            [S, B, Vp/tp] with the whole S, or a little wider unless `cuts_off`.
        """
        context = self.context
        blocks = context.gate.blocks_of(self.weight)
        if blocks is None:
            return linear(x, self.weight, bias, context=context, input_type=input_type)
        y = linear_by_blocks(x, self.weight, bias, blocks=blocks, context=context, input_type=input_type)
        return y[..., : self.rows_per_rank] if cuts_off else y
