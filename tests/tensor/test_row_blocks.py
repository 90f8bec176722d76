"""A table in blocks looks up, multiplies and takes gradients like the whole one; against dense torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron3d.params.row_blocks import RowBlock
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext, unsharded_context
from megatron3d.tensor.embedding import VocabParallelEmbedding
from megatron3d.tensor.row_blocks import linear_by_blocks, lookup

RANKS, OF_EACH, H = 3, 5, 8
BLOCKS = tuple(RowBlock(RANKS, OF_EACH, start, stop) for start, stop in ((0, 2), (2, 4), (4, 5)))


@dataclass
class Cut:
    """A whole table, of which the layer sees blocks, and the gradients that came for each."""

    table: nn.Parameter
    gradient: Tensor = field(default_factory=lambda: torch.zeros(RANKS * OF_EACH, H))
    num_rows: int = RANKS * OF_EACH

    def weights(self) -> Iterator[tuple[RowBlock, Tensor]]:
        for block in BLOCKS:
            rows = block.columns_of(torch.arange(self.num_rows)).flatten()
            weight = self.table.detach()[rows]
            yield block, weight
            weight.fill_(torch.nan)  # whoever reads it later makes NaN

    def buffers(self) -> Iterator[tuple[RowBlock, Tensor]]:
        for block in BLOCKS:
            buffer = torch.full((block.num_rows, H), torch.nan)  # which a gradient overwrites
            yield block, buffer
            self.gradient[block.columns_of(torch.arange(self.num_rows)).flatten()] += buffer

    def add_rows(self, rows_T: Tensor, grad_TH: Tensor) -> None:
        raise AssertionError("nothing is looked up")


def cut_table(dtype: torch.dtype = torch.float32) -> Cut:
    generator = torch.Generator().manual_seed(3)
    return Cut(nn.Parameter(torch.randn(RANKS * OF_EACH, H, generator=generator).to(dtype)))


def bound(cut: Cut) -> LayerContext:
    context = unsharded_context()
    context.sink.bind_blocks(cut.table, cut, lambda: None)
    return context


def test_a_lookup_in_blocks_finds_the_rows_of_the_whole_table_bit_for_bit() -> None:
    cut, rows = cut_table(torch.bfloat16), torch.tensor([0, 14, 7, 7, 2, 4, 9, 13])
    assert torch.equal(lookup(rows, cut), cut.table.detach()[rows])


@pytest.mark.parametrize("of_bias", [None, RANKS * OF_EACH, 13])
def test_a_product_by_blocks_and_all_its_gradients_are_those_of_the_whole_table(of_bias: int | None) -> None:
    cut, generator = cut_table(), torch.Generator().manual_seed(4)
    x, grad = (torch.randn(6, 2, size, generator=generator) for size in (H, cut.num_rows))
    bias = None if of_bias is None else nn.Parameter(torch.randn(of_bias, generator=generator))
    context = bound(cut)
    x_of_blocks = x.clone().requires_grad_()
    y = linear_by_blocks(x_of_blocks, cut.table, bias, blocks=cut, context=context, input_type="local")
    y.backward(grad)

    whole, x_of_whole = cut.table.detach().clone().requires_grad_(), x.clone().requires_grad_()
    all_of_bias = None if bias is None else F.pad(bias.detach(), (0, cut.num_rows - bias.numel())).requires_grad_()
    expected = F.linear(x_of_whole, whole, all_of_bias)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x_of_blocks.grad, x_of_whole.grad)
    torch.testing.assert_close(cut.gradient, whole.grad)
    if bias is not None and all_of_bias is not None and all_of_bias.grad is not None:
        torch.testing.assert_close(bias.grad, all_of_bias.grad[: bias.numel()])


def test_logits_of_a_table_in_blocks_end_with_its_rows_unless_a_loss_takes_them() -> None:
    cut, padded = cut_table(), 13
    context = bound(cut)
    layer = VocabParallelEmbedding(context, 12, H, padded_size=padded, init=Init("zeros"))
    layer.weight = cut.table
    context.gate.bind(Blocks(cut))
    x = torch.randn(4, H, generator=torch.Generator().manual_seed(6))
    expected = x @ cut.table.detach().t()
    widths = [layer.scores(x, input_type="local", cuts_off=cuts_off) for cuts_off in (True, False)]
    torch.testing.assert_close(widths, [expected[:, :padded], expected])


class Blocks:
    """A gatherer of one table."""

    releases = True

    def __init__(self, cut: Cut) -> None:
        self.cut = cut

    def gather_weights(self, place: str, *, backward: bool) -> None:
        """Nothing."""

    def release_weights(self, place: str, *, backward: bool) -> None:
        """Nothing."""

    def blocks_of(self, table: nn.Parameter) -> Cut:
        return self.cut


def test_gradients_of_the_input_add_up_in_fp32_where_the_layer_computes_in_bf16() -> None:
    cut, generator = cut_table(torch.bfloat16), torch.Generator().manual_seed(5)
    x = torch.zeros(1, 400, H, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(1, 400, cut.num_rows, generator=generator).to(torch.bfloat16)
    linear_by_blocks(x, cut.table, None, blocks=cut, context=bound(cut), input_type="local").backward(grad)
    exact = grad.double() @ cut.table.detach().double()
    of_whole = (grad @ cut.table.detach()).double()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert (x.grad.double() - exact).norm() < 1.5 * (of_whole - exact).norm()
