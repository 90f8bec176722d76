"""ZeroEngine at any layout against plain AdamW on the whole parameters: weights, states, norms, bytes, traffic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron3d.comm.collectives import all_reduce, gather_values
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Mesh, make_mesh
from megatron3d.config.sections.optim import OptimConfig
from megatron3d.errors import ConfigError
from megatron3d.optim.build import build_optimizer, set_grad_scale, set_rates, state_bytes, write_copies
from megatron3d.optim.clip import clip_factor
from megatron3d.params.boxes import Box, ShardView
from megatron3d.params.grads import GradSink
from megatron3d.params.init import initial_full
from megatron3d.params.module import Declared, ParallelModule, declared_parameters
from megatron3d.params.norms import sum_of_squares
from megatron3d.params.spec import Init
from megatron3d.zero.engine import ZeroEngine
from megatron3d.zero.policy import policy_of
from megatron3d.zero.unit import FlatUnit, UnitOptions
from tests.dist.pool import Pool
from tests.zero.toy import (
    NUM_MICROBATCHES,
    SEED,
    TABLE,
    Setting,
    contribution,
    engine_of,
    grad_axis,
    has_experts,
    num_samples,
    tensor_axis,
    whole_gradient,
    whole_specs,
)

NUM_STEPS = 4
LR, WEIGHT_DECAY, MAX_NORM = 0.05, 0.1, 3.0
BF16, FP32 = torch.bfloat16, torch.float32
ADAM = OptimConfig(lr=1e-3, optimizer="adam")
# Fused and plain AdamW round differently: a few units in the last place of fp32 a step.
RTOL, ATOL = 1e-5, 1e-6

Boxes = dict[str, list[tuple[Box, Tensor]]]


def backward(engine: ZeroEngine, declared: dict[str, Declared], mesh: Mesh, sink: GradSink, step: int) -> None:
    """Bring every contribution of this rank's micro-batches, as its layers and its schedule would."""
    for mb in range(NUM_MICROBATCHES):
        engine.before_backward(mesh.pp.rank)
        for name, one in declared.items():
            holder = 1 if mesh.pp.rank > 0 and name.startswith(TABLE) else 0
            sample, tensor = grad_axis(one.spec, mesh).rank * NUM_MICROBATCHES + mb, tensor_axis(one.spec, mesh)
            grad = contribution(one.spec, step, sample, holder=holder, tp=tensor.size, tp_rank=tensor.rank)
            sink.add(one.parameter, grad.to(one.parameter.dtype))
        engine.after_backward(mesh.pp.rank)


def layers_of(engine: ZeroEngine, declared: dict[str, Declared]) -> dict[str, Tensor]:
    """What the layers read after the last update, wherever the weights are kept meanwhile."""
    engine.finish_publish()
    for unit in engine.units.values():
        unit.weights.start_gather()
        unit.weights.finish_gather()
    layers = {name: one.parameter.detach().clone() for name, one in declared.items()}
    for unit in engine.units.values():
        unit.weights.free()
    return layers


def reduced_norm(engine: ZeroEngine, mesh: Mesh) -> float:
    return math.sqrt(float(all_reduce(engine.squared_norm().reshape(1), mesh.world)))


def boxes_of(views: dict[str, ShardView]) -> Boxes:
    return {name: [(box, part.clone()) for box, part in view.box_tensors()] for name, view in views.items()}


def train(mesh: Mesh, setting: Setting) -> tuple[dict[str, Any], list[float]]:
    """Make the steps; what this rank then holds, and the norm of each step."""
    sink = GradSink()
    engine, declared = engine_of(setting, mesh, sink)
    optimizer = build_optimizer(ADAM, [(flat.parameter, flat.decays) for flat in engine.flat_parameters])
    # What the optimizer can do itself, it does in every other setting.
    writes_copies = setting.overlap and write_copies(optimizer, engine.layer_copies())
    norms = []
    for step in range(NUM_STEPS):
        engine.begin_step(NUM_MICROBATCHES)
        backward(engine, declared, mesh, sink, step)
        engine.reduce_stage(mesh.pp.rank)
        engine.finish_reduce()
        norms.append(reduced_norm(engine, mesh))
        factor = clip_factor(norms[-1], MAX_NORM)
        if not (setting.overlap and set_grad_scale(optimizer, factor)):
            engine.scale_grads(factor)
        set_rates(optimizer, lr=LR, weight_decay=WEIGHT_DECAY)
        engine.step(optimizer, writes_copies=writes_copies)
        engine.clear_grads()
    held = {
        "weights": boxes_of(engine.weight_views()),
        "exp_avg": boxes_of(engine.state_views(optimizer, "exp_avg")),
        "exp_avg_sq": boxes_of(engine.state_views(optimizer, "exp_avg_sq")),
        "layers": layers_of(engine, declared),
    }
    return held, norms


def reference(mesh: Mesh, num_holders: int) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """The same steps by torch's plain AdamW over whole parameters in one process."""
    specs = whole_specs(with_experts=has_experts(mesh.layout))
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
            weights[name].grad = whole_gradient(
                spec, step, num_samples=num_samples(spec, mesh), num_holders=num_holders
            )
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
    expected, expected_norms = reference(mesh, num_holders)
    specs = whole_specs(with_experts=has_experts(mesh.layout))
    for setting in settings:
        held, norms = train(mesh, setting)
        torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            everyone = gather_values(held[kind], mesh.world)
            for name, spec in specs.items():
                replica = mesh.expert_replica if spec.kind == "expert" else mesh.replica
                copies = replica.size if setting.zero_stage > 0 else grad_axis(spec, mesh).size
                copies *= tensor_axis(spec, mesh).size if spec.is_replicated else 1
                copies *= num_holders if name.startswith("table") else 1
                whole = put_together(everyone, name, spec.shape, num_copies=copies)
                where = f"{setting}, {kind} of {name}"
                close = torch.allclose(whole, expected[kind][name], rtol=RTOL, atol=ATOL)
                assert close, f"{where} differ by up to {(whole - expected[kind][name]).abs().max()}"
                if kind == "weights" and name in held["layers"]:
                    tensor = tensor_axis(spec, mesh)
                    shard = spec.take(whole, tensor.size, tensor.rank).to(setting.param_dtype)
                    assert torch.equal(held["layers"][name], shard), f"{setting}: layers do not read {name}"


LAYOUTS = [
    Layout(),
    Layout(dp=2),
    Layout(dp=4),
    Layout(dp=4, zero_shard=2),
    Layout(dp=2, zero_shard=1),
    Layout(tp=2, dp=2),
    Layout(tp=2, dp=4, zero_shard=2),
    Layout(tp=4),
    Layout(pp=2, dp=2),
    Layout(pp=3),
    Layout(cp=2, dp=2, ep=2),
    Layout(tp=2, dp=2, ep=2, etp=1),
    Layout(dp=4, ep=2, zero_shard=2),
]
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16)]
STAGES = (0, 1, 2, 3)


def layout_id(layout: Layout) -> str:
    return f"{layout}{f' in shards of {layout.zero_shard}' if layout.zero_shard else ''}"


# What these combine others have in pairs.
SLOW = (Layout(tp=2, dp=4, zero_shard=2), Layout(dp=4, ep=2, zero_shard=2))


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=[pytest.mark.slow] if layout in SLOW else []) for layout in LAYOUTS],
    ids=layout_id,
)
def test_training_equals_plain_adamw_on_whole_parameters(pool: Pool, layout: Layout) -> None:
    settings = [
        Setting(layout, stage, param, grad, overlap)
        for stage in STAGES
        for param, grad in DTYPES
        for overlap in ((True, False) if (param, grad) != (BF16, FP32) else (True,))
    ]
    if layout.world_size == 1:
        _train_and_compare(0, 1, settings)
    else:
        pool.run(layout.world_size, _train_and_compare, settings)


def _train_twice(rank: int, world_size: int, layout: Layout) -> None:
    mesh = make_mesh(layout)
    for stage in STAGES:
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
    """Calls that reduce: before and after the end of each of two backwards, after `reduce_stage`, at the end."""
    mesh, sink = make_mesh(Layout(dp=2)), GradSink()
    engine, declared = engine_of(Setting(mesh.layout, stage, overlap=overlap), mesh, sink)
    calls = []

    def note() -> None:
        calls.append(sum(count for (axis, _), (count, _) in mesh.meter.read().items() if axis in ("grad", "shard")))

    engine.begin_step(2)
    for _ in range(2):
        engine.before_backward(0)
        for one in declared.values():
            sink.add(one.parameter, torch.ones_like(one.parameter))
        note()
        engine.after_backward(0)
        note()
    engine.reduce_stage(0)
    note()
    engine.finish_reduce()
    note()
    return calls


@pytest.mark.parametrize(
    ("stage", "overlap", "calls"),
    [
        (0, True, [0, 0, 3, 3, 3, 3]),
        (0, False, [0, 0, 0, 0, 3, 3]),
        (1, True, [0, 0, 3, 3, 3, 3]),
        (1, False, [0, 0, 0, 0, 3, 3]),
        (2, True, [3, 3, 6, 6, 6, 6]),
        (2, False, [0, 3, 3, 6, 6, 6]),
        (3, True, [3, 3, 6, 6, 6, 6]),
        (3, False, [0, 3, 3, 6, 6, 6]),
    ],
)
def test_reductions_start_with_the_last_gradient_of_the_step_or_with_sharded_gradients_of_each_backward(
    pool: Pool, stage: int, overlap: bool, calls: list[int]
) -> None:
    assert pool.run(2, _when_reductions_start, overlap, stage) == [calls] * 2


def _storages(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages beneath these tensors."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values()
    )


def _attributes(buffer: object) -> list[Tensor | None]:
    return [value for value in vars(buffer).values() if isinstance(value, Tensor)]


def _bytes(rank: int, world_size: int, layout: Layout) -> dict[Setting, tuple[int, int, int]]:
    mesh = make_mesh(layout)
    return {
        setting: _bytes_of(setting, mesh)
        for setting in (Setting(layout, stage, *dtypes) for stage in STAGES for dtypes in DTYPES)
    }


def _bytes_of(setting: Setting, mesh: Mesh) -> tuple[int, int, int]:
    """Length of all units, this rank's state bytes without the optimizer's, and elements it owns."""
    engine, declared = engine_of(setting, mesh, GradSink())
    optimizer = build_optimizer(ADAM, [(flat.parameter, flat.decays) for flat in engine.flat_parameters])
    found, units = engine.state_bytes(), list(engine.units.values())
    buffers = [tensor for unit in units for buffer in (unit.weights, unit.grads) for tensor in _attributes(buffer)]
    held = found.weights + found.gradients + found.master_weights
    assert held == _storages(buffers), "what is reported is what is allocated"
    parameters = _storages(one.parameter for one in declared.values())
    assert parameters == (0 if setting.zero_stage == 3 else found.weights), "parameters are views of the weights"
    local = sum(math.prod(one.spec.local_shape(mesh.tp.size)) for one in declared.values())
    length = sum(unit.layout.length for unit in units)
    num_segments = sum(len(unit.layout.segments) for unit in units)
    assert local <= length < local + 32 * num_segments + 32 * mesh.grad.size * len(units), "padding beyond alignment"
    in_flat_parameters = sum(flat.parameter.numel() for flat in engine.flat_parameters)
    assert state_bytes(optimizer) == 2 * 4 * in_flat_parameters
    owned = sum(unit.own.length for unit in units)
    assert in_flat_parameters <= owned
    return length, held, owned


# Bytes for each parameter without Adam's moments (8/N more): what stays, and what is divided by the N ranks that share.
BYTES_PER_PARAMETER = {
    (BF16, FP32): {0: (10, 0), 1: (6, 4), 2: (2, 8), 3: (0, 10)},
    (BF16, BF16): {0: (12, 0), 1: (4, 8), 2: (2, 10), 3: (0, 12)},
    (FP32, FP32): {0: (8, 0), 1: (8, 0), 2: (4, 4), 3: (0, 8)},
}


@pytest.mark.parametrize(
    "layout", [Layout(tp=2, dp=2), Layout(dp=4), Layout(dp=4, zero_shard=2), Layout(dp=8)], ids=layout_id
)
def test_state_bytes_are_those_allocated_and_those_of_the_formula(pool: Pool, layout: Layout) -> None:
    """With 16-bit gradients and Adam 4 + 16/N, 2 + 18/N, 20/N bytes at stages 1, 2, 3; with fp32 gradients and bf16
    weights 6 + 12/N, 2 + 16/N, 18/N.

    Source: the table of Megatron-LM's distributed optimizer for stage 1; Rajbhandari et al. 2020, section 5.
    """
    for found in pool.run(layout.world_size, _bytes, layout):
        for setting, (length, held, owned) in found.items():
            stays, shared = BYTES_PER_PARAMETER[setting.param_dtype, setting.grad_dtype][setting.zero_stage]
            assert owned * (layout.shard_size if setting.zero_stage else 1) == length
            assert held == stays * length + shared * owned, f"{setting}"


def _transient(rank: int, world_size: int, setting: Setting) -> tuple[list[int], int]:
    """Transient bytes now, after a step and after a read of all weights; and the largest unit's gradient bytes."""
    mesh, sink = make_mesh(setting.layout), GradSink()
    engine, declared = engine_of(setting, mesh, sink)
    held = [engine.transient.held_bytes]
    engine.begin_step(NUM_MICROBATCHES)
    backward(engine, declared, mesh, sink, 0)
    engine.finish_reduce()
    engine.publish()
    held.append(engine.transient.held_bytes)
    layers_of(engine, declared)
    held.append(engine.transient.held_bytes)
    return held, engine.state_bytes().transient_peak


@pytest.mark.parametrize("stage", STAGES)
def test_transient_buffers_are_given_back(pool: Pool, stage: int) -> None:
    for held, peak in pool.run(2, _transient, Setting(Layout(dp=2), stage, BF16, FP32)):
        assert held == [0, 0, 0]
        assert (peak > 0) == (stage >= 2)


def _traffic(rank: int, world_size: int, setting: Setting) -> list[Any]:
    mesh = make_mesh(setting.layout)
    sink = GradSink()
    engine, declared = engine_of(setting, mesh, sink)
    engine.begin_step(NUM_MICROBATCHES)
    backward(engine, declared, mesh, sink, 0)
    engine.finish_reduce()
    engine.publish()
    lengths = [unit.layout.length for unit in engine.units.values()]
    return [mesh.meter.read(), len(lengths), sum(lengths)]


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_step_moves_the_gradients_once_or_once_a_backward_and_the_weights_once_or_when_used(
    pool: Pool, zero_stage: int
) -> None:
    for counted, num_units, length in pool.run(2, _traffic, Setting(Layout(dp=2), zero_stage, BF16, FP32)):
        once, each = (num_units, 4 * length), (NUM_MICROBATCHES * num_units, NUM_MICROBATCHES * 4 * length)
        published = {("gather", "all_gather"): (num_units, 2 * length)}
        assert (
            counted
            == {
                0: {("grad", "all_reduce"): once},
                1: {("shard", "reduce_scatter"): once, **published},
                2: {("shard", "reduce_scatter"): each, **published},
                3: {("shard", "reduce_scatter"): each},
            }[zero_stage]
        )


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_hierarchical_sharding_sums_over_the_replicas_once_and_only_the_own_part(pool: Pool, zero_stage: int) -> None:
    """Reduce-scatters and gathers stay inside the groups of K ranks; across them goes 1/K of the gradients, once.

    Source: Zhang et al. 2022 (MiCS), section 3.4 (2-hop gradient synchronization).
    """
    for counted, num_units, length in pool.run(4, _traffic, Setting(Layout(dp=4, zero_shard=2), zero_stage)):
        times = 1 if zero_stage == 1 else NUM_MICROBATCHES
        expected = {
            ("shard", "reduce_scatter"): (times * num_units, times * 4 * length),
            ("replica", "all_reduce"): (num_units, 4 * length // 2),
        }
        if zero_stage < 3:
            expected["gather", "all_gather"] = (num_units, 4 * length)
        assert counted == expected


def test_clearing_forgets_the_gradients_of_the_step() -> None:
    """A step after another has the gradients, bit for bit, of an engine that made no step before it."""

    def norm_after(steps: list[int]) -> float:
        mesh, sink = make_mesh(Layout()), GradSink()
        engine, declared = engine_of(Setting(mesh.layout), mesh, sink)
        norms = []
        for step in steps:
            engine.begin_step(NUM_MICROBATCHES)
            backward(engine, declared, mesh, sink, step)
            engine.finish_reduce()
            norms.append(reduced_norm(engine, mesh))
            engine.clear_grads()
        return norms[-1]

    assert norm_after([0, 1]) == norm_after([1]) != norm_after([0])


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
    total = sum_of_squares([*unit.counted_grads()], torch.device("cpu"))
    torch.testing.assert_close(total, grad.double().square().sum(), rtol=1e-6, atol=0)


def test_a_step_that_lacks_a_gradient_or_gets_one_too_many_is_refused() -> None:
    mesh, sink = make_mesh(Layout()), GradSink()
    engine, declared = engine_of(Setting(mesh.layout), mesh, sink)
    engine.begin_step(NUM_MICROBATCHES + 1)
    backward(engine, declared, mesh, sink, 0)
    with pytest.raises(ConfigError, match=r"lacks .*--freeze-params"):
        engine.finish_reduce()
    engine.clear_grads()
    engine.begin_step(NUM_MICROBATCHES - 1)
    with pytest.raises(AssertionError, match="after all that were expected"):
        backward(engine, declared, mesh, sink, 0)
