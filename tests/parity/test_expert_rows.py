"""Rows of experts: how many are exchanged, what if all go to one rank; and experts in checkpoints of other layouts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.loader import GlobalBatches
from megatron3d.models.counts import declared_specs
from megatron3d.moe.layer import MixtureOfExperts
from megatron3d.moe.router import Routing, TokenPlaces
from megatron3d.moe.transport import Dispatched
from megatron3d.optim.schedule import settings_from_config
from megatron3d.train import state
from megatron3d.train.evaluate import evaluate
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.step import train_step
from tests.dist.pool import Pool
from tests.parity.compare import GRADIENT_TOLERANCE, LOSS_TOLERANCE, relative
from tests.parity.routing import Choices, recording, replaying, to_the_first
from tests.parity.runs import RATES, Case, Trace, assemble, config_of, data_of, parts_of, trace

GATED, MANY = "experts", "experts-many"
S, H, LAYERS, BATCH, E, K = 16, 32, 4, 8, 4, 2
FP32, INT64 = 4, 8
SP = "--sequence-parallel"
FULL = "--recompute-granularity full"
REUSING = f"{FULL} --recompute-reuse-communication"
PADDED = "--moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity"
GATHERED = "--moe-token-dispatcher-type allgather"

COSTS = [
    # A layer sends rows, gets them back, and their gradients go the same two ways.
    pytest.param(Layout(dp=2, ep=2), "--micro-batch-size 2", 4, 1, marks=pytest.mark.slow),
    pytest.param(Layout(tp=2, ep=2, etp=1), f"{SP} --micro-batch-size 2", 4, 1, marks=pytest.mark.slow),
    # Without sequence parallelism all ranks hold all tokens, and each sends its part of them.
    (Layout(tp=2, ep=2, etp=1), "--micro-batch-size 2", 4, 1),
    (Layout(dp=2, ep=2), f"{FULL} --micro-batch-size 2", 6, 2),
    # Recomputed from what was kept, a layer communicates as if it were not; padded, no count is exchanged.
    (Layout(dp=2, ep=2), f"{REUSING} --micro-batch-size 2", 4, 1),
    pytest.param(Layout(tp=2, ep=2, etp=1), f"{SP} {REUSING} --micro-batch-size 2", 4, 1, marks=pytest.mark.slow),
    (Layout(dp=2, ep=2), f"{PADDED} --micro-batch-size 2", 4, 0),
]


def counted(rank: int, world_size: int, layout: Layout, options: str) -> dict[str, tuple[int, int]]:
    """Calls and bytes of a rank's collectives over the expert axis in one step."""
    mesh = make_mesh(layout)
    parts = parts_of(Case(GATED, layout, options), mesh)
    data = data_of(parts.config)
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        batch = batches.read(0, BATCH, mesh.batch.rank, mesh.batch.size)
    mesh.meter.reset()
    train_step(parts, batch, RATES, step=0)
    return {collective: count for (axis, collective), count in mesh.meter.read().items() if axis == "expert"}


@pytest.mark.parametrize(("layout", "options", "payloads", "counts"), COSTS, ids=str)
def test_rows_are_exchanged_once_each_way_and_counts_once_a_layer(
    pool: Pool, layout: Layout, options: str, payloads: int, counts: int
) -> None:
    """Summed over the ranks of an expert group, each exchange moves K rows of H numbers for each token of theirs."""
    found = [one["all_to_all"] for one in pool.run(2, counted, layout, options)]
    micros = BATCH // 2 // layout.dp
    assert {calls for calls, _ in found} == {micros * LAYERS * (payloads + counts)}
    rows = BATCH * S * K
    of_counts = 2 * E * INT64 * micros * LAYERS * counts
    assert sum(size for _, size in found) == LAYERS * payloads * rows * H * FP32 + of_counts


def test_gathers_move_each_token_once_for_every_rank(pool: Pool) -> None:
    """Tokens and what experts give, and the gradients of both: four exchanges of N tokens of all ranks. Beside them the
    numbers of the chosen experts, and their weights with their gradients."""
    micros, tokens = BATCH // 2 // 2, 2 * 2 * S
    hidden, chosen = tokens * H * FP32, tokens * K
    for found in pool.run(2, counted, Layout(dp=2, ep=2), f"{GATHERED} --micro-batch-size 2"):
        layers = micros * LAYERS
        assert found == {
            "all_gather": (4 * layers, layers * (2 * hidden + chosen * (INT64 + FP32))),
            "reduce_scatter": (3 * layers, layers * (2 * hidden + chosen * FP32)),
        }


KEPT = [
    (Case(MANY, Layout(tp=2, ep=2, etp=1)), SP),
    (Case(GATED, Layout(dp=2, ep=2)), f"{GATHERED} --zero-stage 3"),
    (Case("gpt2-drops", Layout(tp=2)), ""),
]


def traced_both_ways(rank: int, world_size: int) -> list[tuple[Trace, Trace]]:
    """Body of a worker: two steps of each case, recomputed by communicating again and from what was kept."""
    return [
        tuple(
            trace(parts_of(replace(case, options=f"{options} {way}"), make_mesh(case.layout)), num_steps=2)
            for way in (FULL, REUSING)
        )
        for case, options in KEPT
    ]


def test_recomputing_from_kept_results_changes_no_bit(pool: Pool) -> None:
    for pairs in pool.run(2, traced_both_ways):
        for again, kept in pairs:
            assert again.losses == kept.losses and again.norms == kept.norms
            for name, pieces in again.gradients.items():
                for (box, values), (other_box, others) in zip(pieces, kept.gradients[name], strict=True):
                    assert box == other_box and torch.equal(values, others), name


def keep_counts(module: MixtureOfExperts, rows: Counter[tuple[int, int]]) -> None:
    """Add up the rows that come to this rank's experts of a layer."""
    dispatch = module.transport.dispatch

    def dispatch_and_keep(x_TH: Tensor, routing: Routing, places: TokenPlaces) -> Dispatched:
        arrived = dispatch(x_TH, routing, places)
        rows.update({(module.layer, int(n)): count for n, count in zip(module.experts, arrived.counts, strict=True)})
        return arrived

    module.transport = mock.Mock(dispatch=dispatch_and_keep)


def received(case: Case) -> tuple[dict[tuple[int, int], int], dict[tuple[str, str], tuple[int, int]]]:
    """The rows that this rank received in one step, by layer and expert, and the calls and bytes of its collectives."""
    mesh = make_mesh(case.layout)
    parts = parts_of(case, mesh)
    rows = Counter[tuple[int, int]]()
    for stage in parts.model.stages.values():
        for module in stage.modules():
            if isinstance(module, MixtureOfExperts):
                keep_counts(module, rows)
    mesh.meter.reset()
    trace(parts, num_steps=1)
    return dict(rows), mesh.meter.read()


def received_as_recorded(
    rank: int, world_size: int, case: Case, choices: Choices
) -> tuple[dict[tuple[int, int], int], dict[tuple[str, str], tuple[int, int]]]:
    """Body of a worker: the same with the routing of another run."""
    with replaying(choices):
        return received(case)


@pytest.mark.parametrize(
    "layout", [Layout(tp=2, ep=2, etp=1), pytest.param(Layout(tp=4, ep=4, etp=1), marks=pytest.mark.slow)], ids=str
)
def test_ranks_that_hold_the_same_tokens_receive_together_what_one_rank_would(pool: Pool, layout: Layout) -> None:
    """Without sequence parallelism every tensor rank holds all tokens, and each sends another part of them. The parts
    are gathered behind the experts, and their gradients before them."""
    with recording() as record:
        alone, _ = received(Case(GATED, Layout()))
    assert sum(alone.values()) == LAYERS * BATCH * S * K
    by_rank = pool.run(layout.world_size, received_as_recorded, Case(GATED, layout), record.choices())
    together = Counter[tuple[int, int]]()
    for rows, _ in by_rank:
        together.update(rows)
    assert together == alone
    micros = BATCH // 4
    sent_rows = LAYERS * BATCH * S * K // layout.tp
    for rows, collectives in by_rank:
        payload = 2 * (sum(rows.values()) + sent_rows) * H * FP32  # there and back, forward and backward
        counts = micros * LAYERS * E * INT64
        assert collectives["expert", "all_to_all"] == (micros * LAYERS * (4 + 1), payload + counts)
        added, loss = 2 * LAYERS * BATCH * S * H * FP32, layout.tp * 3 * BATCH * S * FP32
        assert collectives["tp", "all_gather"] == ((2 * LAYERS + 1) * micros, added + loss)


EXTREME = {
    GATED: [
        Case(GATED, Layout(dp=2, ep=2), "--zero-stage 3"),
        Case(GATED, Layout(tp=2, ep=2, etp=1), f"{SP} {FULL}"),
        Case(GATED, Layout(tp=2, ep=2, etp=1), GATHERED),
    ]
}
MORE_EXTREME = {
    GATED: [
        Case(GATED, Layout(dp=4, ep=4), "--zero-stage 3"),
        Case(GATED, Layout(pp=2, dp=2, ep=2), f"--zero-stage 3 {FULL}"),
        Case(GATED, Layout(tp=2, pp=2, ep=2, etp=1), "--pipeline-schedule zb-v"),
        Case(GATED, Layout(tp=2, dp=2, ep=2), f"{SP} --zero-stage 2"),
    ],
    # With a capacity, of which all that the first experts are chosen for is twice as much.
    MANY: [
        Case(MANY, Layout(dp=4, ep=4), "--zero-stage 3"),
        Case(MANY, Layout(pp=2, dp=2, ep=2), "--zero-stage 3 --num-layers-per-virtual-pipeline-stage 1"),
        Case(MANY, Layout(tp=4, ep=2, etp=2), ""),
    ],
}


def traced_to_the_first(rank: int, world_size: int, cases: list[Case]) -> list[Trace]:
    """Body of a worker: three steps in which all tokens choose the first experts."""
    with to_the_first():
        return [trace(parts_of(case, make_mesh(case.layout)), num_steps=3) for case in cases]


@pytest.mark.parametrize(
    ("model", "cases"),
    [
        *EXTREME.items(),
        *(pytest.param(*one, id=f"more-{one[0]}", marks=pytest.mark.slow) for one in MORE_EXTREME.items()),
    ],
)
def test_all_tokens_may_choose_the_same_experts(pool: Pool, model: str, cases: list[Case]) -> None:
    (expected,) = traced_to_the_first(0, 1, [Case(model, Layout())])
    config = config_of(Case(model, Layout())).model
    shapes = {spec.name: spec.shape for spec in declared_specs(config) if spec.name in expected.gradients}
    whole = assemble([expected], shapes)
    numbers = range(config.moe_router_topk, config.num_experts or 0)
    idle = [name for name in whole if any(f".experts.{number}." in name for number in numbers)]
    assert len(idle) >= 2 * len(numbers) * config.num_expert_layers
    assert all(float(whole[name].abs().max()) == 0 for name in idle)
    by_rank = pool.run(cases[0].layout.world_size, traced_to_the_first, cases)
    for number, case in enumerate(cases):
        traces = [found[number] for found in by_rank]
        assert relative(traces[0].losses, expected.losses) < LOSS_TOLERANCE, str(case)
        for name, gradient in assemble(traces, shapes).items():
            largest = max(float(whole[name].abs().max()), torch.finfo().tiny)
            assert float((gradient - whole[name]).abs().max()) <= GRADIENT_TOLERANCE * largest, f"{case}: {name}"


def evaluated(rank: int, world_size: int, case: Case) -> dict[str, float]:
    """Losses of the initial weights over two batches."""
    mesh = make_mesh(case.layout)
    parts = parts_of(case, mesh)
    data = data_of(parts.config)
    with GlobalBatches(data.reader(data.valid), num_workers=0) as batches:
        return dict(evaluate(parts, batches, num_batches=2).losses)


def test_an_evaluation_gives_the_losses_of_one_process(pool: Pool) -> None:
    alone = evaluated(0, 1, Case(MANY, Layout()))
    assert alone.keys() == {"lm", "seq_balance", "global_balance"}
    for found in pool.run(2, evaluated, Case(MANY, Layout(tp=2, ep=2, etp=1), SP)):
        assert found == pytest.approx(alone, rel=LOSS_TOLERANCE)


SAVED_STEPS = 2
RESUMED = [
    (
        Case(MANY, Layout(dp=2, ep=2), "--zero-stage 1"),
        [Case(MANY, Layout(tp=2, ep=2, etp=1), SP), Case(MANY, Layout(tp=2), "--zero-stage 3")],
    ),
    pytest.param(
        Case(MANY, Layout(dp=4, ep=4), "--zero-stage 3"),
        [
            Case(MANY, Layout(tp=2, dp=2, ep=2), "--zero-stage 1"),
            Case(MANY, Layout(tp=2, dp=2, ep=2, etp=1), f"{SP} --zero-stage 2"),
            Case(MANY, Layout(tp=2, pp=2, ep=2, etp=1)),
        ],
        marks=pytest.mark.slow,
    ),
]


def everything(parts: TrainingSetup) -> Trace:
    """Weights, state of modules and moments that a rank has, as a trace has gradients."""
    views = dict(parts.model_views())
    for kind in ("exp_avg", "exp_avg_sq"):
        views |= {f"{kind}/{n}": view for n, view in parts.engine.state_views(parts.optimizer, kind).items()}
    with torch.no_grad():
        return Trace([], [], {n: [(b, t.clone()) for b, t in view.box_tensors()] for n, view in views.items()})


def saved(
    rank: int, world_size: int, case: Case, choices: Choices, directory: str
) -> tuple[Trace, dict[str, tuple[int, ...]]]:
    """Body of a worker: what it has after some steps, of which it has saved a checkpoint, and the full shapes."""
    case = replace(case, options=f"{case.options} --save {directory}")
    parts = parts_of(case, make_mesh(case.layout))
    with replaying(choices):
        trace(parts, num_steps=SAVED_STEPS)
    samples = SAVED_STEPS * BATCH
    progress = state.Progress(SAVED_STEPS, samples, SAVED_STEPS, samples)
    state.save(parts, progress, settings_from_config(parts.config.optim, parts.config.train))
    shapes = {name: view.full_shape for name, view in parts.model_views().items()}
    return everything(parts), shapes


def restored(
    rank: int, world_size: int, cases: list[Case], choices: Choices, directory: str
) -> list[tuple[Trace, list[float]]]:
    """Body of a worker: what each case has of the checkpoint, and the losses of as many steps more."""
    found = []
    for case in cases:
        parts = parts_of(replace(case, options=f"{case.options} --load {directory}"), make_mesh(case.layout))
        assert state.restore(parts).progress.step == SAVED_STEPS
        has = everything(parts)
        with replaying(choices):
            found.append((has, trace(parts, num_steps=SAVED_STEPS, first_step=SAVED_STEPS).losses))
    return found


@pytest.mark.parametrize(("case", "resumed"), RESUMED, ids=["ep2", "ep4"])
def test_a_checkpoint_of_sharded_experts_goes_on_at_any_layout_bit_for_bit(
    pool: Pool, tmp_path: Path, case: Case, resumed: list[Case]
) -> None:
    """What is restored is what was saved, bit for bit, and the steps after it have the losses of one process that was
    never interrupted, whose routing all replay."""
    alone = Case(case.model, Layout())
    with recording() as record:
        uninterrupted = trace(parts_of(alone, make_mesh(Layout())), num_steps=2 * SAVED_STEPS).losses
    choices, directory = record.choices(), str(tmp_path)
    of_ranks = pool.run(case.layout.world_size, saved, case, choices, directory)
    shapes = {name: shape for _, known in of_ranks for name, shape in known.items()}
    of_router = (".bias", ".previous")  # state, which has no moments
    trained = {name: shape for name, shape in shapes.items() if not (".router" in name and name.endswith(of_router))}
    shapes |= {f"{kind}/{name}": shape for name, shape in trained.items() for kind in ("exp_avg", "exp_avg_sq")}
    expected = assemble([one for one, _ in of_ranks], shapes)
    assert not any(value.isnan().any() for value in expected.values())
    by_rank = pool.run(case.layout.world_size, restored, resumed, choices, directory)
    of_cases = [[found[number] for found in by_rank] for number in range(len(resumed))]
    for ranks in [*of_cases, restored(0, 1, [alone], choices, directory)]:
        found = assemble([has for has, _ in ranks], shapes)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        for _, losses in ranks:
            assert relative(losses, uninterrupted[SAVED_STEPS:]) < LOSS_TOLERANCE
