"""What steps report of experts: the load and the entropy of every layer, the same at every layout."""

from __future__ import annotations

import math

import pytest

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.loader import GlobalBatches
from megatron3d.train.step import train_step
from tests.dist.pool import Pool
from tests.parity.routing import to_the_first
from tests.parity.runs import RATES, Case, data_of, parts_of

NUM_EXPERTS, NUM_CHOSEN, NUM_LAYERS = 4, 2, 4


def loads_of_a_step(rank: int, world_size: int, case: Case) -> dict[str, float]:
    """Those of the first step, in which all tokens choose the first experts."""
    mesh = make_mesh(case.layout)
    parts = parts_of(case, mesh)
    data = data_of(parts.config)
    with to_the_first(), GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        batch = batches.read(0, 8, mesh.batch.rank, mesh.batch.size)
        return dict(train_step(parts, batch, RATES, step=0).expert_loads)


def test_a_step_reports_the_load_and_the_entropy_of_each_layer_at_every_layout(pool: Pool) -> None:
    alone = loads_of_a_step(0, 1, Case("experts", Layout()))
    layers = range(NUM_LAYERS)
    assert {alone[f"expert_load/layer_{i}"] for i in layers} == {NUM_EXPERTS / NUM_CHOSEN}
    # Logits are almost 0 at first, so that nothing is decided.
    assert all(alone[f"router_entropy/layer_{i}"] == pytest.approx(math.log(NUM_EXPERTS), rel=0.01) for i in layers)
    assert len(alone) == 2 * NUM_LAYERS
    for layout, options in ((Layout(pp=2), ""), (Layout(tp=2, ep=2, etp=1), "--recompute-granularity full")):
        for found in pool.run(2, loads_of_a_step, Case("experts", layout, options)):
            assert found == pytest.approx(alone, rel=1e-5)


def test_a_dense_model_reports_none() -> None:
    assert loads_of_a_step(0, 1, Case("gpt2", Layout())) == {}
