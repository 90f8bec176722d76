"""Learned positions are rows of a table, rotary ones angles by the formula; both follow given position ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.nn.positions import LearnedPositions, rotary_table
from megatron3d.params.grads import GradSink
from megatron3d.tensor.context import LayerContext
from tests.dist.pool import Pool
from tests.nn.dense import model_config
from tests.tensor.full import assert_gradients_equal, fill, numbered

CONFIG = model_config(max_position_embeddings=10)
IDS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 0, 1, 2]])
CPU = torch.device("cpu")


def check_learned(context: LayerContext, ids_BS: Tensor | None) -> None:
    module = LearnedPositions(CONFIG, context)
    table = fill(module, context.tp)["weight"].clone().requires_grad_()
    rows_SB = torch.arange(8).unsqueeze(1) if ids_BS is None else ids_BS.t()
    dense_SBH = torch.stack([torch.stack([table[row] for row in rows_B]) for rows_B in rows_SB.tolist()])
    weight_of_loss = numbered(*dense_SBH.shape, seed=4)
    (weight_of_loss * dense_SBH**2).sum().backward()
    share = 8 // context.tp.size if context.sequence_parallel else 8
    first = share * context.tp.rank if context.sequence_parallel else 0
    own = slice(first, first + share)
    found = module(8, ids_BS)
    torch.testing.assert_close(found, dense_SBH.detach()[own])
    (weight_of_loss[own] * found**2).sum().backward()
    assert_gradients_equal(module, context.tp, {"weight": table})


def _check_learned(rank: int, world_size: int) -> None:
    axis = make_mesh(Layout(tp=world_size)).tp
    for sequence_parallel in (False, True):
        for ids_BS in (None, IDS):
            check_learned(LayerContext(axis, sequence_parallel, GradSink()), ids_BS)


@pytest.mark.parametrize("tp", [1, 2])
def test_learned_positions_and_their_gradients_equal_rows_of_the_whole_table(pool: Pool, tp: int) -> None:
    if tp == 1:
        _check_learned(0, 1)
    else:
        pool.run(tp, _check_learned)


@pytest.mark.parametrize(("base", "percent"), [(10000.0, 1.0), (500000.0, 0.5)])
def test_rotary_angles_are_position_times_frequency(base: float, percent: float) -> None:
    config = model_config(kv_channels=8, rotary_base=base, rotary_percent=percent)
    cos, sin = rotary_table(config, 6, None, device=CPU)
    rotated = int(8 * percent)
    angles = torch.tensor(
        [[p * base ** (-2 * i / rotated) for i in range(rotated // 2)] for p in range(6)], dtype=torch.float64
    )
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (6, rotated // 2)
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-6)


def test_rotary_tables_with_position_ids_are_rows_of_the_plain_table() -> None:
    config = model_config(kv_channels=8)
    cos, sin = rotary_table(config, 10, None, device=CPU)
    cos_BSR, sin_BSR = rotary_table(config, 8, IDS, device=CPU)
    assert torch.equal(cos_BSR, cos[IDS]) and torch.equal(sin_BSR, sin[IDS])


def test_far_positions_keep_their_angle_to_the_precision_of_fp32() -> None:
    """Angles up to 131072 rad in fp32 are off by up to 2^-7 rad, as in every fp32 table; not by more."""
    config = model_config(kv_channels=8, rotary_base=500000.0)
    far = torch.tensor([[131071]])
    cos, _ = rotary_table(config, 1, far, device=CPU)
    exact = torch.tensor([131071 * 500000.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64).cos()
    torch.testing.assert_close(cos[0].double(), exact, rtol=0, atol=2**-7)
