"""ZeroEngine at any layout against plain AdamW on the whole parameters: weights, states, norms, bytes, traffic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron3d.comm.collectives import all_reduce, gather_values
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.config.optim import OptimConfig
from megatron3d.optim.build import build_optimizer, set_rates, state_bytes
from megatron3d.optim.clip import clip_factor
from megatron3d.params.boxes import Box, ShardView
from megatron3d.params.grads import GradSink
from megatron3d.params.init import initial_full
from megatron3d.params.module import Declared, ParallelModule, declared_parameters
from megatron3d.params.spec import Init
from megatron3d.zero.engine import ZeroEngine
from megatron3d.zero.policy import policy_of
from megatron3d.zero.unit import FlatUnit, UnitOptions
from tests.dist.pool import Pool
from tests.zero.toy import NUM_MICROBATCHES, SEED, TABLE, Setting, contribution, engine_of, whole_gradient, whole_specs

NUM_STEPS = 4
LR, WEIGHT_DECAY, MAX_NORM = 0.05, 0.1, 3.0
BF16, FP32 = torch.bfloat16, torch.float32
ADAM = OptimConfig(optimizer="adam")
# Fused and plain AdamW round differently: a few units in the last place of fp32 a step.
RTOL, ATOL = 1e-5, 1e-6

Boxes = dict[str, list[tuple[Box, Tensor]]]


def backward(declared: dict[str, Declared], mesh: Mesh, sink: GradSink, step: int) -> None:
    """Bring every contribution of this rank's micro-batches, as its layers would."""
    for mb in range(NUM_MICROBATCHES):
        sample = mesh.dp.rank * NUM_MICROBATCHES + mb
        for name, one in declared.items():
            holder = 1 if mesh.pp.rank > 0 and name.startswith(TABLE) else 0
            grad = contribution(one.spec, step, sample, holder=holder, tp=mesh.tp.size, tp_rank=mesh.tp.rank)
            sink.add(one.parameter, grad.to(one.parameter.dtype))


def reduced_norm(engine: ZeroEngine, mesh: Mesh) -> float:
    return math.sqrt(float(all_reduce(engine.squared_norm().reshape(1), mesh.world)))


def boxes_of(views: dict[str, ShardView]) -> Boxes:
    return {name: [(box, part.clone()) for box, part in view.pieces()] for name, view in views.items()}


def train(mesh: Mesh, setting: Setting) -> tuple[dict[str, Any], list[float]]:
    """Make the steps; what this rank then holds, and the norm of each step."""
    sink = GradSink()
    engine, declared = engine_of(setting, mesh, sink)
    optimizer = build_optimizer(ADAM, [(piece.parameter, piece.decays) for piece in engine.pieces])
    norms = []
    for step in range(NUM_STEPS):
        engine.begin_step(NUM_MICROBATCHES)
        backward(declared, mesh, sink, step)
        engine.reduce_stage(mesh.pp.rank)
        engine.finish_reduce()
        norms.append(reduced_norm(engine, mesh))
        engine.scale_grads(clip_factor(norms[-1], MAX_NORM))
        set_rates(optimizer, lr=LR, weight_decay=WEIGHT_DECAY)
        optimizer.step()
        engine.publish()
        engine.clear_grads()
    held = {
        "weights": boxes_of(engine.weight_views()),
        "exp_avg": boxes_of(engine.state_views(optimizer, "exp_avg")),
        "exp_avg_sq": boxes_of(engine.state_views(optimizer, "exp_avg_sq")),
        "layers": {name: one.parameter.detach().clone() for name, one in declared.items()},
    }
    return held, norms


def reference(num_samples: int, num_holders: int) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """The same steps by torch's plain AdamW over whole parameters in one process."""
    specs = whole_specs()
    weights = {name: torch.nn.Parameter(initial_full(spec, seed=SEED)) for name, spec in specs.items()}
    groups = [
        {"params": [weights[n] for n, s in specs.items() if s.decays == decays], "weight_decay": WEIGHT_DECAY * decays}
        for decays in (True, False)
    ]
    betas = (ADAM.adam_beta1, ADAM.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=betas, eps=ADAM.adam_eps, foreach=False, fused=False)
    norms = []
    for step in range(NUM_STEPS):
        for name, spec in specs.items():
            weights[name].grad = whole_gradient(spec, step, num_samples=num_samples, num_holders=num_holders)
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), MAX_NORM)))
        optimizer.step()
    states = {key: {n: optimizer.state[w][key] for n, w in weights.items()} for key in ("exp_avg", "exp_avg_sq")}
    return {"weights": {n: w.detach() for n, w in weights.items()}, **states}, norms


def put_together(everyone: list[Boxes], name: str, shape: tuple[int, ...], *, num_copies: int) -> Tensor:
    """The whole tensor from the boxes of all ranks, of which each element has exactly `num_copies` equal copies."""
    count, whole = torch.zeros(shape, dtype=torch.int64), torch.full(shape, float("nan"))
    for held in everyone:
        for box, part in held.get(name, []):
            count[box.slices()] += 1
            known = whole[box.slices()]
            assert torch.equal(torch.where(known.isnan(), part, known), part), f"copies of {name} differ"
            whole[box.slices()] = part
    assert bool((count == num_copies).all()), f"{name}: copies of its elements {count.unique().tolist()}"
    return whole


def _train_and_compare(rank: int, world_size: int, settings: list[Setting]) -> None:
    mesh = make_mesh(settings[0].layout)
    num_holders = mesh.tied.size if mesh.pp.size == 1 else 2
    expected, expected_norms = reference(mesh.dp.size * NUM_MICROBATCHES, num_holders)
    specs = whole_specs()
    for setting in settings:
        held, norms = train(mesh, setting)
        torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            everyone = gather_values(held[kind], mesh.world)
            for name, spec in specs.items():
                copies = 1 if setting.zero_stage else mesh.dp.size
                copies *= mesh.tp.size if spec.is_replicated else 1
                copies *= num_holders if name.startswith("table") else 1
                whole = put_together(everyone, name, spec.shape, num_copies=copies)
                where = f"{setting}, {kind} of {name}"
                close = torch.allclose(whole, expected[kind][name], rtol=RTOL, atol=ATOL)
                assert close, f"{where} differ by up to {(whole - expected[kind][name]).abs().max()}"
                if kind == "weights" and name in held["layers"]:
                    shard = spec.take(whole, mesh.tp.size, mesh.tp.rank).to(setting.param_dtype)
                    assert torch.equal(held["layers"][name], shard), f"{setting}: layers do not read {name}"


LAYOUTS = [Layout(), Layout(dp=2), Layout(dp=4), Layout(tp=2, dp=2), Layout(tp=4), Layout(pp=2, dp=2), Layout(pp=3)]
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_equals_plain_adamw_on_whole_parameters(pool: Pool, layout: Layout) -> None:
    settings = [
        Setting(layout, stage, param, grad, overlap)
        for stage in (0, 1)
        for param, grad in DTYPES
        for overlap in (True, False)
    ]
    if layout.world_size == 1:
        _train_and_compare(0, 1, settings)
    else:
        pool.run(layout.world_size, _train_and_compare, settings)


def _train_twice(rank: int, world_size: int, layout: Layout) -> None:
    mesh = make_mesh(layout)
    for stage in (0, 1):
        overlapped, plain = (train(mesh, Setting(layout, stage, BF16, FP32, overlap)) for overlap in (True, False))
        assert overlapped[1] == plain[1]
        for name, weight in overlapped[0]["layers"].items():
            assert torch.equal(weight, plain[0]["layers"][name])
        for name, pieces in overlapped[0]["weights"].items():
            for (box, part), (other_box, other) in zip(pieces, plain[0]["weights"][name], strict=True):
                assert box == other_box and torch.equal(part, other)


def test_overlap_changes_no_bit(pool: Pool) -> None:
    pool.run(4, _train_twice, Layout(tp=2, dp=2))


def _when_reductions_start(rank: int, world_size: int, overlap: bool, stage: int) -> list[int]:
    """Calls on the dp axis after the first micro-batch, after the last, after `reduce_stage`, and at the end."""
    mesh, sink = make_mesh(Layout(dp=2)), GradSink()
    engine, declared = engine_of(Setting(mesh.layout, stage, overlap=overlap), mesh, sink)
    calls = []

    def note() -> None:
        calls.append(sum(count for (axis, _), (count, _) in mesh.meter.read().items() if axis == "dp"))

    engine.begin_step(2)
    for _ in range(2):
        for one in declared.values():
            sink.add(one.parameter, torch.ones_like(one.parameter))
        note()
    engine.reduce_stage(0)
    note()
    engine.finish_reduce()
    note()
    return calls


@pytest.mark.parametrize("stage", [0, 1])
def test_reductions_start_with_the_last_gradient_where_they_overlap_and_tied_tables_wait(
    pool: Pool, stage: int
) -> None:
    assert pool.run(2, _when_reductions_start, True, stage) == [[0, 2, 2, 3]] * 2
    assert pool.run(2, _when_reductions_start, False, stage) == [[0, 0, 2, 3]] * 2


def _bytes(rank: int, world_size: int, setting: Setting) -> None:
    mesh = make_mesh(setting.layout)
    engine, declared = engine_of(setting, mesh, GradSink())
    optimizer = build_optimizer(ADAM, [(piece.parameter, piece.decays) for piece in engine.pieces])
    found, units = engine.state_bytes(), list(engine.units.values())
    storages = {
        "weights": {unit.weights.untyped_storage() for unit in units},
        "grads": {unit.grads.untyped_storage() for unit in units},
    }
    assert found.weights == sum(storage.nbytes() for storage in storages["weights"])
    assert found.gradients == sum(storage.nbytes() for storage in storages["grads"])
    local = sum(math.prod(one.spec.local_shape(mesh.tp.size)) for one in declared.values())
    length = found.weights // setting.param_dtype.itemsize
    num_segments = sum(len(unit.layout.segments) for unit in units)
    assert local <= length < local + 32 * num_segments + 32 * mesh.dp.size * len(units), "padding beyond alignment"
    assert found.gradients == length * setting.grad_dtype.itemsize
    owned = length // mesh.dp.size if setting.zero_stage else length
    assert found.master_weights == (0 if setting.param_dtype == FP32 else 4 * owned)
    if setting.param_dtype != FP32:
        assert sum(unit.master.untyped_storage().nbytes() for unit in units) == found.master_weights
    in_pieces = sum(piece.parameter.numel() for piece in engine.pieces)
    assert state_bytes(optimizer) == 2 * 4 * in_pieces and in_pieces <= owned


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_state_bytes_are_those_allocated_and_those_of_the_formula(
    pool: Pool, zero_stage: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    pool.run(4, _bytes, Setting(Layout(tp=2, dp=2), zero_stage, *dtypes))


def _traffic(rank: int, world_size: int, setting: Setting) -> list[Any]:
    mesh = make_mesh(setting.layout)
    sink = GradSink()
    engine, declared = engine_of(setting, mesh, sink)
    engine.begin_step(NUM_MICROBATCHES)
    backward(declared, mesh, sink, 0)
    engine.finish_reduce()
    engine.publish()
    lengths = [unit.layout.length for unit in engine.units.values()]
    return [mesh.meter.read(), len(lengths), sum(lengths)]


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_step_moves_the_gradients_once_and_with_zero_one_the_weights_once(pool: Pool, zero_stage: int) -> None:
    for counted, num_units, length in pool.run(2, _traffic, Setting(Layout(dp=2), zero_stage, BF16, FP32)):
        if zero_stage == 0:
            assert counted == {("dp", "all_reduce"): (num_units, 4 * length)}
        else:
            assert counted == {
                ("dp", "reduce_scatter"): (num_units, 4 * length),
                ("dp", "all_gather"): (num_units, 2 * length),
            }


def test_clearing_forgets_the_gradients_of_the_step() -> None:
    mesh, sink = make_mesh(Layout()), GradSink()
    engine, declared = engine_of(Setting(mesh.layout), mesh, sink)
    engine.begin_step(NUM_MICROBATCHES)
    backward(declared, mesh, sink, 0)
    engine.finish_reduce()
    assert reduced_norm(engine, mesh) > 0
    engine.clear_grads()
    engine.begin_step(0)
    engine.finish_reduce()
    assert reduced_norm(engine, mesh) == 0.0


def test_the_norm_of_a_large_unit_is_exact_to_fp32() -> None:
    """Squares added one after another in fp32 are off by 1e-4 over this many elements, and by percents over more."""
    mesh, sink, module = make_mesh(Layout()), GradSink(), ParallelModule()
    module.declare("weight", (3000, 2000), init=Init("zeros"), decays=True)
    options = UnitOptions(policy_of(0), FP32, FP32, torch.device("cpu"), SEED)
    unit = FlatUnit("large", tuple(declared_parameters(module).values()), mesh, options, tied=None)
    unit.bind(sink)
    grad = torch.randn(3000, 2000, generator=torch.Generator().manual_seed(1))
    unit.expect(1)
    sink.add(module.weight, grad)
    unit.finish_reduce()
    torch.testing.assert_close(unit.squared_norm(), grad.double().square().sum(), rtol=1e-6, atol=0)


def test_a_step_that_lacks_a_gradient_or_gets_one_too_many_is_refused() -> None:
    mesh, sink = make_mesh(Layout()), GradSink()
    engine, declared = engine_of(Setting(mesh.layout), mesh, sink)
    engine.begin_step(NUM_MICROBATCHES + 1)
    backward(declared, mesh, sink, 0)
    with pytest.raises(AssertionError, match="lacks"):
        engine.finish_reduce()
    engine.clear_grads()
    engine.begin_step(NUM_MICROBATCHES - 1)
    with pytest.raises(AssertionError, match="after all that were expected"):
        backward(declared, mesh, sink, 0)
