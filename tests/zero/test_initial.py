"""Initial weights of a unit: a rank draws what it keeps, and that is the same at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.params.grads import GradSink
from megatron3d.zero import unit
from tests.dist.pool import Pool
from tests.zero.toy import Setting, engine_of


def _drawn(rank: int, world_size: int, zero_stage: int) -> tuple[int, int, list[float]]:
    """Numbers that this rank drew, elements of its parameters, and its part of the weights."""
    fill, drawn = unit.fill_initial, 0

    def counted(out: torch.Tensor, *arguments: Any, **options: Any) -> None:
        nonlocal drawn
        drawn += out.numel()
        fill(out, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit, "fill_initial", counted)
        engine, _ = engine_of(Setting(Layout(dp=world_size), zero_stage), make_mesh(Layout(dp=world_size)), GradSink())
    elements = sum(slot.span.length for one in engine.units.values() for slot in one.layout.slots)
    return drawn, elements, torch.cat([one.master for one in engine.units.values()]).tolist()


def test_a_rank_draws_its_part_of_sharded_weights_and_all_of_others(pool: Pool) -> None:
    resident, sharded = (pool.run(2, _drawn, stage) for stage in (2, 3))
    assert all(drawn == elements for drawn, elements, _ in resident)
    assert sum(drawn for drawn, _, _ in sharded) == sharded[0][1]
    assert [part for _, _, part in sharded] == [part for _, _, part in resident]
