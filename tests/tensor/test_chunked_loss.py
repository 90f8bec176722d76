"""The loss in chunks: the bits of the whole one where there is one chunk, its values where there are more, at every way
in which the input is sharded; the same communication; and never more logits than a chunk has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.params.grads import GradSink
from megatron3d.params.spec import Init
from megatron3d.tensor.chunked_loss import ChunkedProjection, chunked_cross_entropy
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.embedding import VocabParallelEmbedding
from megatron3d.tensor.linear import InputType
from megatron3d.tensor.loss import vocab_parallel_cross_entropy, vocab_parallel_hits
from tests.dist.pool import Pool
from tests.largest_result import LargestResult
from tests.tensor.full import fill, numbered

P, H = 24, 6  # positions, hidden
VOCAB, PADDED = 50, 64
INPUT_TYPES: tuple[InputType, ...] = ("I", "V", "local")


def targets() -> Tensor:
    return torch.randint(0, VOCAB, (P,), generator=torch.Generator().manual_seed(3))


Traffic = dict[tuple[str, str], tuple[int, int]]


def results(
    mesh: Mesh, input_type: InputType, *, num_chunks: int | None, defers: bool = False
) -> tuple[list[Tensor], Traffic]:
    """Losses, hits, gradients of input, table and bias, and what went over the axis; None makes all logits at once."""
    context = LayerContext(mesh.tp, input_type == "V", GradSink())
    table = VocabParallelEmbedding(context, VOCAB, H, padded_size=PADDED, init=Init("normal", 0.02))
    fill(table, mesh.tp, dtype=torch.float32)
    columns = slice(table.first_row, table.first_row + table.rows_per_rank)
    bias = torch.nn.Parameter(numbered(PADDED, seed=8, dtype=torch.float32)[columns].clone())
    x = context.local_sequence(numbered(P, H, seed=4, dtype=torch.float32)).clone().requires_grad_()
    if num_chunks is None:
        shard = {"first_row": table.first_row, "num_valid": table.num_valid_rows, "kernels": context.kernels}
        logits = table.scores(x, bias, input_type=input_type, cuts_off=False)
        loss = vocab_parallel_cross_entropy(logits, targets(), mesh.tp, **shard)
    else:
        projection = ChunkedProjection(table, bias, context, input_type, num_chunks)
        loss, hits = chunked_cross_entropy(x, targets(), projection)
    objective = (loss * numbered(P, seed=5, dtype=torch.float32)).sum()
    if defers:
        with context.sink.defer() as work:
            objective.backward()
        assert bias.grad is None and table.weight.grad is None
        for one in work:
            one()
    else:
        objective.backward()
    assert x.grad is not None and table.weight.grad is not None and bias.grad is not None
    traffic = mesh.meter.read()
    if num_chunks is None:
        with torch.no_grad():
            logits = table.scores(x, bias, input_type=input_type, cuts_off=False)
            hits = vocab_parallel_hits(logits, targets(), mesh.tp, **shard)
    return [loss.detach(), hits, x.grad, table.weight.grad, bias.grad], traffic


def check_all_types(rank: int, world_size: int) -> None:
    for input_type in INPUT_TYPES if world_size > 1 else ("local",):
        whole, traffic = results(make_mesh(Layout(tp=world_size)), input_type, num_chunks=None)
        assert 0 < whole[1].sum() < P
        for num_chunks, defers in ((1, False), (1, True), (5, False), (5, True), (40, False)):
            mesh = make_mesh(Layout(tp=world_size))
            found, of_chunks = results(mesh, input_type, num_chunks=num_chunks, defers=defers)
            assert of_chunks == traffic
            for a, b in zip(whole, found, strict=True):
                if num_chunks == 1:
                    assert torch.equal(a, b), f"{input_type} {defers}"
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_chunk_gives_the_bits_of_the_whole_loss_and_more_give_its_values() -> None:
    check_all_types(0, 1)


def test_so_it_is_where_the_vocabulary_is_sharded_whatever_the_type_of_the_input(pool: Pool) -> None:
    pool.run(2, check_all_types)


def _are_logits(one: Tensor) -> bool:
    """Whether the last dimension is the vocabulary, as it is not in the table and its gradient."""
    return one.dim() > 0 and one.shape[-1] == PADDED


@pytest.mark.parametrize("defers", [False, True])
def test_no_more_logits_exist_than_a_chunk_has(defers: bool) -> None:
    with LargestResult(_are_logits) as seen:
        results(make_mesh(Layout()), "local", num_chunks=2, defers=defers)
    assert seen.elements == P // 2 * PADDED
    with LargestResult(_are_logits) as seen:
        results(make_mesh(Layout()), "local", num_chunks=None)
    assert seen.elements == P * PADDED
