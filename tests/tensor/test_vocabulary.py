"""Vocabulary-parallel embedding and cross-entropy against dense torch, with padding rows and ranks of nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.params.grads import GradSink
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.embedding import VocabParallelEmbedding, padded_vocab_size
from megatron3d.tensor.loss import vocab_parallel_cross_entropy
from tests.dist.pool import Pool
from tests.tensor.full import assert_gradients_equal, fill, numbered

S, B, H = 8, 3, 6
VOCAB, PADDED = 10, 16  # on four ranks: 4, 4, 2 and 0 valid rows
LAYOUTS = [(1, False), (2, False), (2, True), (4, False), (4, True)]
JUNK = 80.0  # a logit in a padding column that would win every softmax


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (S, B), generator=torch.Generator().manual_seed(3))


def table_of(context: LayerContext) -> VocabParallelEmbedding:
    return VocabParallelEmbedding(context, VOCAB, H, padded_size=PADDED, init=Init("normal", 0.02))


def check_embedding(context: LayerContext) -> None:
    table = table_of(context)
    leaf = fill(table, context.tp)["weight"].clone().requires_grad_()
    weight_of_loss = numbered(S, B, H, seed=4)
    dense = F.embedding(tokens(), leaf)
    (weight_of_loss * dense**2).sum().backward()
    share = S // context.tp.size if context.sequence_parallel else S
    own = slice(share * context.tp.rank, share * (context.tp.rank + 1)) if context.sequence_parallel else slice(None)
    found = table(tokens())
    torch.testing.assert_close(found, dense.detach()[own])
    (weight_of_loss[own] * found**2).sum().backward()
    assert_gradients_equal(table, context.tp, {"weight": leaf})


def check_cross_entropy(context: LayerContext, dtype: torch.dtype) -> None:
    table = table_of(context)
    logits = numbered(S, B, VOCAB, seed=5, dtype=dtype) * 4
    logits[0, 0] += 300  # exp would overflow without the maximum taken out
    weight_of_loss = numbered(S, B, seed=6, dtype=torch.float32)
    wide = logits.double().clone().requires_grad_()
    dense = F.cross_entropy(wide.flatten(0, 1), tokens().flatten(), reduction="none").view(S, B)
    (weight_of_loss * dense).sum().backward()
    columns = slice(table.first_row, table.first_row + table.rows_per_rank)
    own = F.pad(logits, (0, PADDED - VOCAB), value=JUNK)[..., columns].clone().requires_grad_()
    found = vocab_parallel_cross_entropy(
        own, tokens(), context.tp, first_row=table.first_row, num_valid=table.num_valid_rows, kernels=context.kernels
    )
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The loss is computed from the logits in fp32 whatever their dtype; their gradient is rounded to it.
    exact = dtype == torch.float64
    torch.testing.assert_close(found.double(), dense.detach(), rtol=1e-12 if exact else 1e-5, atol=1e-4 * (not exact))
    (weight_of_loss * found).sum().backward()
    expected = F.pad(wide.grad, (0, PADDED - VOCAB))[..., columns].to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(own.grad, expected, rtol=tolerance, atol=tolerance)
    assert torch.count_nonzero(own.grad[..., table.num_valid_rows :]) == 0


def _check_vocabulary(rank: int, world_size: int, sequence_parallel: bool) -> int:
    context = LayerContext(make_mesh(Layout(tp=world_size)).tp, sequence_parallel, GradSink())
    check_embedding(context)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_cross_entropy(context, dtype)
    return table_of(context).num_valid_rows


@pytest.mark.parametrize(("tp", "sequence_parallel"), LAYOUTS)
def test_embedding_and_cross_entropy_equal_dense(pool: Pool, tp: int, sequence_parallel: bool) -> None:
    if tp == 1:
        valid = [_check_vocabulary(0, 1, sequence_parallel)]
    else:
        valid = pool.run(tp, _check_vocabulary, sequence_parallel)
    assert valid == {1: [10], 2: [8, 2], 4: [4, 4, 2, 0]}[tp]


def _loss_traffic(rank: int, world_size: int) -> dict[tuple[str, str], tuple[int, int]]:
    mesh = make_mesh(Layout(tp=world_size))
    context = LayerContext(mesh.tp, False, GradSink())
    table = table_of(context)
    logits = torch.zeros(S, B, table.rows_per_rank, requires_grad=True)
    loss = vocab_parallel_cross_entropy(
        logits, tokens(), mesh.tp, first_row=table.first_row, num_valid=table.num_valid_rows, kernels=context.kernels
    )
    loss.sum().backward()
    return mesh.meter.read()


def test_three_numbers_a_token_and_rank_cross_the_axis_and_no_logits(pool: Pool) -> None:
    assert pool.run(2, _loss_traffic) == [{("tp", "all_gather"): (1, 2 * 3 * S * B * 4)}] * 2


@given(st.integers(1, 1000), st.integers(1, 128), st.sampled_from([1, 2, 4, 8]))
def test_the_padded_vocabulary_is_the_smallest_multiple_that_holds_it(vocab: int, divisor: int, tp: int) -> None:
    padded = padded_vocab_size(vocab, divisible_by=divisor, tp=tp)
    assert padded % (divisor * tp) == 0 and vocab <= padded < vocab + divisor * tp
