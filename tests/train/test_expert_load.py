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
from tests.parity.runs import RATES, Case, data_of, parts_of, trace_cases

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
    begun = "--freeze-params embedding.* layers.0.* layers.1.*"  # of which zb-v has stages of their own
    for layout, options in (
        (Layout(pp=2), ""),
        (Layout(tp=2, ep=2, etp=1), "--recompute-granularity full"),
        (Layout(pp=2), f"--pipeline-schedule zb-v {begun}"),
    ):
        for found in pool.run(2, loads_of_a_step, Case("experts", layout, options)):
            assert found == pytest.approx(alone, rel=1e-5)
    assert loads_of_a_step(0, 1, Case("experts", Layout(), begun)) == pytest.approx(alone, rel=1e-5)


def test_experts_of_some_ranks_alone_may_train(pool: Pool) -> None:
    frozen = "--freeze-params embedding.* *.attention* *norm.* *.experts.0.* *.experts.1.*"
    layouts = (Layout(dp=2, ep=2), Layout(tp=2, ep=2, etp=1))
    reference = trace_cases(0, 1, [Case("experts", Layout(), frozen, 2)])[0]
    by_rank = pool.run(2, trace_cases, [Case("experts", layout, frozen, 2) for layout in layouts], timeout_s=60)
    for traces in by_rank:
        for one in traces:
            assert one.losses == pytest.approx(reference.losses, rel=1e-5)
            assert one.norms == pytest.approx(reference.norms, rel=1e-4)


def test_a_dense_model_reports_none() -> None:
    assert loads_of_a_step(0, 1, Case("gpt2", Layout())) == {}
