"""Every optimizer at every layout against the papers' formulas over whole parameters; who works on which matrix."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron3d.comm.collectives import gather_values
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.config.sections.optim import OptimConfig
from megatron3d.optim.build import build_optimizer, other_state_views, set_rates, state_names
from megatron3d.params.grads import GradSink
from megatron3d.params.init import initial_full
from megatron3d.params.spec import Init, ParamSpec
from megatron3d.zero import full_parameters
from megatron3d.zero.engine import ZeroEngine
from megatron3d.zero.full_parameters import assign_owners, tiles_of
from tests.dist.pool import Pool
from tests.optim.formulas import Whole
from tests.zero.test_engine import Boxes, backward, boxes_of, put_together
from tests.zero.toy import (
    NUM_MICROBATCHES,
    SEED,
    Setting,
    engine_of,
    has_experts,
    num_samples,
    whole_gradient,
    whole_specs,
)

NUM_STEPS = 4
LR, WEIGHT_DECAY = 0.02, 0.1
CONFIGS = {
    "lion": OptimConfig(lr=1e-3, optimizer="lion"),
    "adam-l2": OptimConfig(lr=1e-3, optimizer="adam", decoupled_weight_decay=False),
    "lamb": OptimConfig(lr=1e-3, optimizer="lamb"),
    "adafactor": OptimConfig(lr=1e-3, optimizer="adafactor"),
    "muon": OptimConfig(lr=1e-3, optimizer="muon"),
    "muon-variant": OptimConfig(
        lr=1e-3, optimizer="muon", muon_nesterov=True, muon_split_qkv=False, muon_extra_scale_factor=0.2
    ),
    "muon-lion": OptimConfig(lr=1e-3, optimizer="muon", muon_scalar_optimizer="lion"),
}
# fp32 against fp64. Newton-Schulz multiplies a small singular value by up to 485, and its rounding error with it.
TOLERANCE = dict.fromkeys(CONFIGS, 2e-6) | {"muon": 2e-5, "muon-variant": 2e-5, "muon-lion": 2e-5}
LAYOUTS = [
    (Layout(), 0),
    (Layout(tp=2), 0),
    (Layout(dp=2), 1),
    (Layout(dp=2), 3),
    (Layout(dp=4), 2),
    (Layout(tp=4), 0),
    (Layout(tp=2, dp=2), 0),
    (Layout(tp=2, dp=2), 1),
    (Layout(dp=4, zero_shard=2), 1),
    (Layout(pp=2, dp=2), 1),
    (Layout(cp=2, dp=2, ep=2), 1),
    (Layout(tp=2, dp=2, ep=2, etp=1), 2),
    (Layout(tp=2, dp=2, ep=2), 0),
]


def train(mesh: Mesh, zero_stage: int, config: OptimConfig, *, by_unit: bool = False) -> dict[str, Boxes]:
    """What this rank holds after some steps: weights and every state, by kind."""
    sink = GradSink()
    engine, declared = engine_of(Setting(mesh.layout, zero_stage), mesh, sink)
    optimizer = build_optimizer(
        config, [(flat.parameter, flat.decays) for flat in engine.flat_parameters], engine.full_parameters
    )
    for step in range(NUM_STEPS):
        engine.begin_step(NUM_MICROBATCHES)
        backward(engine, declared, mesh, sink, step)
        engine.reduce_stage(mesh.pp.rank)
        engine.finish_reduce()
        set_rates(optimizer, lr=LR, weight_decay=WEIGHT_DECAY)
        if by_unit:
            step_by_unit(engine, optimizer)
        else:
            engine.step(optimizer)
        engine.clear_grads()
    held = {"weights": boxes_of(engine.weight_views())}
    for kind in state_names(config):
        held[kind] = boxes_of(engine.state_views(optimizer, kind))
    for key, pieces in boxes_of(other_state_views(optimizer, with_copies=True)).items():
        kind, name = key.split("/")
        held.setdefault(kind, {})[name] = pieces
    return held


def step_by_unit(engine: ZeroEngine, optimizer: torch.optim.Optimizer) -> None:
    engine.finish_publish()  # as `engine.step` does: gathers under way write the buffer of fp32 master weights
    for name, unit in engine.units.items():
        with engine.full_parameters.only(name), unit.gradients_attached(unit.own_grads):
            optimizer.step()
    engine.publish()


def expected(name: str, mesh: Mesh) -> Whole:
    counts = {one.name: num_samples(one, mesh) for one in whole_specs(with_experts=has_experts(mesh.layout)).values()}
    return expected_of(name, tuple(counts.items()), 1 if mesh.pp.size == 1 else 2)


@functools.cache
def expected_of(name: str, num_samples: tuple[tuple[str, int], ...], num_holders: int) -> Whole:
    counts = dict(num_samples)
    specs = {key: spec for key, spec in whole_specs(with_experts=True).items() if key in counts}
    whole = Whole(CONFIGS[name], specs, {key: initial_full(spec, seed=SEED) for key, spec in specs.items()})
    for step in range(NUM_STEPS):
        grads = {
            key: whole_gradient(spec, step, num_samples=counts[key], num_holders=num_holders)
            for key, spec in specs.items()
        }
        whole.step(grads, lr=LR, weight_decay=WEIGHT_DECAY)
    return whole


def _compare(rank: int, world_size: int, layout: Layout, zero_stage: int) -> None:
    mesh = make_mesh(layout)
    for name, config in CONFIGS.items():
        everyone = gather_values(train(mesh, zero_stage, config), mesh.world)
        reference = expected(name, mesh)
        for key, spec in whole_specs(with_experts=has_experts(layout)).items():
            for kind, wanted in {"weights": reference.weights[key], **reference.states[key]}.items():
                found = whole_of([held.get(kind, {}) for held in everyone], key, tuple(wanted.shape))
                scale = wanted.abs().max().clamp(min=1.0)
                error = (found - wanted).abs().max() / scale
                where = f"{name} at {layout} stage {zero_stage}: {kind} of {spec.name}"
                assert error < TOLERANCE[name], f"{where} off by {error}"


def whole_of(everyone: list[Boxes], name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor, all of whose copies are equal to the last bit."""
    copies = [sum(box.numel for box, _ in held.get(name, [])) for held in everyone]
    num_elements = torch.Size(shape).numel()
    assert sum(copies) % num_elements == 0, f"{name}: {copies} elements held of {num_elements}"
    return put_together(everyone, name, shape, num_copies=sum(copies) // num_elements)


@pytest.mark.parametrize(("layout", "zero_stage"), LAYOUTS, ids=lambda value: str(value).replace(" ", ""))
def test_training_equals_the_formulas_over_whole_parameters(pool: Pool, layout: Layout, zero_stage: int) -> None:
    if layout.world_size == 1:
        _compare(0, 1, layout, zero_stage)
    else:
        pool.run(layout.world_size, _compare, layout, zero_stage)


def _step_both_ways(rank: int, world_size: int, layout: Layout) -> None:
    mesh = make_mesh(layout)
    for config in CONFIGS.values():
        at_once, by_unit = (train(mesh, 2, config, by_unit=one) for one in (False, True))
        for kind, boxes in at_once.items():
            for name, pieces in boxes.items():
                for (box, found), (other_box, other) in zip(pieces, by_unit[kind][name], strict=True):
                    assert box == other_box and torch.allclose(found, other, rtol=1e-6, atol=1e-7), (kind, name)


def test_a_step_may_be_made_unit_by_unit(pool: Pool) -> None:
    pool.run(4, _step_both_ways, Layout(tp=2, dp=2))
    pool.run(3, _step_both_ways, Layout(dp=3))  # the last rank has nothing of the smaller units


def _traffic(rank: int, world_size: int, config: OptimConfig) -> dict[Any, Any]:
    mesh = make_mesh(Layout(tp=2, dp=2))
    sink = GradSink()
    engine, declared = engine_of(Setting(mesh.layout, 1), mesh, sink)
    optimizer = build_optimizer(
        config, [(flat.parameter, flat.decays) for flat in engine.flat_parameters], engine.full_parameters
    )
    engine.begin_step(NUM_MICROBATCHES)
    backward(engine, declared, mesh, sink, 0)
    engine.finish_reduce()
    before = mesh.meter.read()
    with ExitStack() as attached:
        for unit in engine.units.values():
            attached.enter_context(unit.gradients_attached(unit.own_grads))
        optimizer.step()
    return {key: count for key, (count, _) in mesh.meter.read().items() if before.get(key, (0, 0))[0] != count} | {
        key: count - before[key][0] for key, (count, _) in mesh.meter.read().items() if key in before
    }


@pytest.mark.parametrize(
    ("name", "operation", "count"),
    [("lion", "all_reduce", 0), ("lamb", "all_reduce", 1), ("adafactor", "all_reduce", 2), ("muon", "all_to_all", 2)],
)
def test_a_step_has_few_exchanges_on_each_axis(pool: Pool, name: str, operation: str, count: int) -> None:
    for found in pool.run(4, _traffic, CONFIGS[name]):
        for axis in ("tp", "shard"):
            calls = {op: number for (its_axis, op), number in found.items() if its_axis == axis and number}
            assert calls == ({operation: count} if count else {})


def _steps_in_tiles(rank: int, world_size: int) -> None:
    mesh = make_mesh(Layout(tp=2, dp=2, ep=2, etp=1))
    for config in (CONFIGS["muon"], CONFIGS["muon-variant"]):
        at_once = train(mesh, 1, config)
        with mock.patch.object(full_parameters, "TILE_CPU", 1):
            in_tiles = train(mesh, 1, config)
        for kind, boxes in at_once.items():
            for name, pieces in boxes.items():
                for (box, found), (other_box, other) in zip(pieces, in_tiles[kind][name], strict=True):
                    assert box == other_box and torch.equal(found, other), (kind, name)


def test_matrices_that_travel_one_by_one_are_updated_bit_for_bit_as_together(pool: Pool) -> None:
    pool.run(4, _steps_in_tiles)


SPECS = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64), st.booleans()), min_size=1, max_size=12)


@given(SPECS, st.integers(1, 4), st.integers(1, 4))
def test_matrices_are_dealt_so_that_no_rank_has_more_than_one_matrix_above_the_mean(
    sizes: list[tuple[int, int, bool]], shard: int, tp: int
) -> None:
    specs = [
        ParamSpec(f"p{i}", (rows, columns), Init("zeros"), True, tp_dim=None if alike else 0)
        for i, (rows, columns, alike) in enumerate(sizes)
    ]
    owners = assign_owners(specs, shard=shard, tp=tp)
    work = [spec.numel * min(spec.shape) for spec in specs]
    load = dict.fromkeys([(s, t) for s in range(shard) for t in range(tp)], 0)
    for spec, owner, amount in zip(specs, owners, work, strict=True):
        assert (owner.tp_rank is None) == spec.is_replicated
        for t in range(tp) if owner.tp_rank is None else (owner.tp_rank,):
            load[owner.shard_rank, t] += amount
    if not any(spec.is_replicated for spec in specs):
        assert max(load.values()) <= sum(work) / len(load) + max(work)
    assert owners == assign_owners(specs, shard=shard, tp=tp), "every rank deals alike"


@given(SPECS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 5000))
def test_a_tile_holds_of_each_owner_one_matrix_or_no_more_than_its_size(
    sizes: list[tuple[int, int, bool]], shard: int, tp: int, most: int
) -> None:
    specs = [
        ParamSpec(f"p{i}", (rows, columns), Init("zeros"), True, tp_dim=None if alike else 0)
        for i, (rows, columns, alike) in enumerate(sizes)
    ]
    owners = assign_owners(specs, shard=shard, tp=tp)
    tiles = tiles_of(specs, owners, most=most)
    assert sorted(number for tile in tiles for number in tile) == list(range(len(specs)))
    for tile in tiles:
        for owner in {owners[number] for number in tile}:
            own = [specs[number].numel for number in tile if owners[number] == owner]
            assert own and (len(own) == 1 or sum(own) <= most)
