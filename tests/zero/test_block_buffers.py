"""Buffers of a table in blocks, on several ranks: what comes, what it sums to, and how much there is at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.params.row_blocks import RowBlock
from megatron3d.zero.block_buffers import BlockedGradients, BlockedWeights
from megatron3d.zero.buffers import MAX_IN_FLIGHT, TransientBuffers
from megatron3d.zero.flat import Span
from megatron3d.zero.kinds import kind_axes
from megatron3d.zero.policy import policy_of
from tests.dist.pool import Pool

OF_EACH, H = 20, 8
BOUNDS = (0, 5, 10, 15, 20)
CPU = torch.device("cpu")


def blocks_over(num_ranks: int) -> tuple[RowBlock, ...]:
    return tuple(RowBlock(num_ranks, OF_EACH, *one) for one in pairwise(BOUNDS))


def quarters(seed: int, *shape: int) -> Tensor:
    """Numbers whose sums are exact in any order, in bf16 too."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)) / 4


def weights_by_block(rank: int, world_size: int) -> tuple[bool, list[int], int, int]:
    """Read all blocks twice; whether they are those of the table, the bytes held meanwhile, and the rest."""
    axes = kind_axes("dense", make_mesh(Layout(dp=world_size)), policy_of(3))
    rows = world_size * OF_EACH
    table, transient, blocks = quarters(1, rows, H), TransientBuffers(), blocks_over(world_size)
    own = Span(rank * OF_EACH * H, (rank + 1) * OF_EACH * H)
    weights = BlockedWeights(
        table.flatten().clone(),
        own,
        axes.gather,
        blocks=blocks,
        dtype=torch.float32,
        transient=transient,
        keeps_master=True,
    )
    weights.free()
    weights.start_gather()
    is_equal, held = True, []
    for _ in range(2):
        for block, weight in weights.weights():
            is_equal = is_equal and torch.equal(weight, table[block.columns_of(torch.arange(rows)).flatten()])
            held.append(transient.held_bytes)
    weights.free()
    return is_equal, held, transient.held_bytes, weights.num_rows


@pytest.mark.parametrize("world_size", [1, 4])
def test_blocks_of_weights_are_rows_of_all_ranks_and_there_is_room_for_two(pool: Pool, world_size: int) -> None:
    of_block = 4 * 5 * world_size * H
    for is_equal, held, left, num_rows in pool.run(world_size, weights_by_block):
        assert is_equal and num_rows == world_size * OF_EACH
        assert held == [2 * of_block] * 8 and left == 0


def sums_of_gradients(rank: int, world_size: int, num_looked_up: int, is_16_bit: bool) -> tuple[Tensor, int, int]:
    """This rank's rows of a gradient of products and lookups, two of each; the most bytes held, and those left."""
    axes = kind_axes("dense", make_mesh(Layout(dp=world_size)), policy_of(3))
    rows, transient, blocks = world_size * OF_EACH, TransientBuffers(), blocks_over(world_size)
    own = Span(rank * OF_EACH * H, (rank + 1) * OF_EACH * H)
    dtype = torch.bfloat16 if is_16_bit else torch.float32
    gradients = BlockedGradients(own, axes, blocks=blocks, dtype=dtype, device=CPU, transient=transient)
    for pass_of_two in range(2):
        dense = quarters(10 * pass_of_two + rank, rows, H)
        for block, buffer in gradients.buffers():
            buffer.copy_(dense[block.columns_of(torch.arange(rows)).flatten()])
        gradients.add_rows(*looked_up(rank, pass_of_two, rows, num_looked_up))
    gradients.finish_scatter()
    return gradients.own.view(-1, H).clone(), transient.peak_bytes, transient.held_bytes


def looked_up(rank: int, pass_of_two: int, num_rows: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows, some of them several times, and their gradients."""
    seed = 1000 + 10 * pass_of_two + rank
    rows = torch.randint(0, num_rows, (count,), generator=torch.Generator().manual_seed(seed))
    return rows, quarters(seed, count, H)


@pytest.mark.parametrize("num_looked_up", [7, OF_EACH + 1], ids=["rows travel", "blocks travel"])
@pytest.mark.parametrize("is_16_bit", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_gradients_of_products_and_lookups_add_up_over_passes_and_ranks(
    pool: Pool, world_size: int, num_looked_up: int, is_16_bit: bool
) -> None:
    rows = world_size * OF_EACH
    expected = torch.zeros(rows, H)
    for pass_of_two in range(2):
        for rank in range(world_size):
            expected += quarters(10 * pass_of_two + rank, rows, H)
            at, grads = looked_up(rank, pass_of_two, rows, num_looked_up)
            expected.index_put_((at,), grads, accumulate=True)
    found = pool.run(world_size, sums_of_gradients, num_looked_up, is_16_bit)
    assert torch.equal(torch.cat([own for own, _, _ in found]), expected)
    of_block = (2 if is_16_bit else 4) * 5 * world_size * H
    assert all(peak == (MAX_IN_FLIGHT + 1) * of_block and left == 0 for _, peak, left in found)
