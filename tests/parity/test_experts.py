"""Mixtures of experts: the layout changes speed and memory, never the result.

With the routing of one process (`routing.py`), 20 steps give its losses, gradient norms, gradients and biases. With
free routing each step from its weights gives its loss, and a token goes elsewhere only where two experts were as good
as equal.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.convert.hf import fill_views
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.step import StepResult, train_step
from tests.dist.pool import Pool
from tests.parity import compare, runs
from tests.parity.compare import LOSS_TOLERANCE, check_against_one_process, relative
from tests.parity.routing import Choices, noting_flips, recording, replaying
from tests.parity.runs import Case, Trace, batches, brief, parts_of, trace

GATED, MANY, PYRAMID = "experts", "experts-many", "experts-pyramid"
SP = "--sequence-parallel"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2"
REUSING = "--recompute-reuse-communication"
PADDED = "--moe-pad-expert-input-to-capacity"
GATHERED = "--moe-token-dispatcher-type allgather"
INTERLEAVED = "--num-layers-per-virtual-pipeline-stage 1"

CASES = [
    Case(GATED, Layout(dp=2, ep=2), "--zero-stage 1"),
    brief(Case(GATED, Layout(tp=2, ep=2, etp=1))),
    brief(Case(GATED, Layout(dp=2, ep=2), f"--zero-stage 3 {FULL}")),
    brief(Case(MANY, Layout(dp=2, ep=2), "--zero-stage 2")),
    brief(Case(MANY, Layout(tp=2, ep=2, etp=1), f"{SP} {FULL}")),
    brief(Case(PYRAMID, Layout(tp=2, ep=2, etp=1), f"{SP} {FULL}")),
]
# Each value of what `values_of` names with each of the others somewhere.
MORE = [
    Case(GATED, Layout(dp=2)),
    Case(GATED, Layout(tp=2), SP),
    Case(GATED, Layout(dp=2, etp=2)),
    Case(GATED, Layout(pp=2), "--pipeline-schedule zb-h1 --micro-batch-size 1"),
    Case(MANY, Layout(tp=2)),
    Case(MANY, Layout(pp=2), f"--pipeline-schedule zb-v {FULL}"),
    Case(GATED, Layout(dp=4, ep=4), "--zero-stage 3"),
    Case(GATED, Layout(dp=4, ep=2), f"--zero-stage 2 {FULL}"),
    Case(GATED, Layout(dp=4, ep=2, zero_shard=2), "--zero-stage 3 --zero-shard-size 2"),
    Case(GATED, Layout(dp=4, ep=2), "--zero-stage 1 --offload-optimizer cpu"),
    Case(GATED, Layout(tp=2, dp=2, ep=2), f"{SP} --zero-stage 1"),
    Case(GATED, Layout(tp=2, dp=2, ep=4, etp=1), "--zero-stage 2"),
    Case(GATED, Layout(tp=2, dp=2, ep=2, etp=1), f"{SP} --zero-stage 3 {FULL}"),
    Case(GATED, Layout(tp=2, pp=2, ep=2, etp=1), f"{SP} --pipeline-schedule zb-v"),
    Case(GATED, Layout(pp=2, dp=2, ep=2), "--zero-stage 2 --pipeline-schedule zb-h1 --micro-batch-size 1"),
    Case(MANY, Layout(pp=2, dp=2, ep=2), "--zero-stage 3"),
    Case(MANY, Layout(pp=2, dp=2, ep=2), f"{INTERLEAVED} {FULL}"),
    Case(MANY, Layout(tp=2, dp=2, ep=2, etp=2), f"{SP} --zero-stage 2"),
    Case(MANY, Layout(tp=4, ep=4, etp=1)),
    Case(PYRAMID, Layout(tp=2)),
    Case(PYRAMID, Layout(dp=2, ep=2), "--zero-stage 3"),
    Case(PYRAMID, Layout(tp=2, pp=2, ep=2, etp=1), "--pipeline-schedule zb-v"),
    Case(MANY, Layout(dp=4, ep=2, etp=2), "--zero-stage 1"),
    Case(GATED, Layout(dp=4, ep=4)),
    Case(GATED, Layout(tp=2, dp=2, ep=4, etp=1), f"--zero-stage 1 {FULL}"),
    Case(GATED, Layout(tp=4, ep=4, etp=1), SP),
    Case(GATED, Layout(pp=2, dp=2, ep=2), f"--zero-stage 1 {FULL}"),
    Case(GATED, Layout(pp=2, dp=2, ep=2), f"--zero-stage 1 {INTERLEAVED}"),
    Case(GATED, Layout(pp=2, dp=2, ep=2), "--zero-stage 3 --pipeline-schedule zb-v"),
    Case(MANY, Layout(tp=2, dp=2, ep=2), "--zero-stage 3"),
    Case(MANY, Layout(pp=2, dp=2, ep=2), f"--zero-stage 1 --pipeline-schedule zb-v {FULL}"),
    Case(MANY, Layout(pp=2, dp=2, ep=2), f"--zero-stage 3 {INTERLEAVED}"),
    Case(GATED, Layout(pp=2, dp=4, ep=4), "--zero-stage 2 --micro-batch-size 1"),
    Case(GATED, Layout(tp=2, pp=2, dp=2, ep=4, etp=1), f"{SP} --zero-stage 2 --pipeline-schedule zb-v {FULL}"),
    Case(MANY, Layout(pp=2, dp=4, ep=4), "--micro-batch-size 1"),
    Case(MANY, Layout(pp=2, dp=4, ep=4), f"--zero-stage 2 --micro-batch-size 1 {INTERLEAVED}"),
    # Other transports, and recomputation that communicates nothing.
    Case(GATED, Layout(dp=2, ep=2), f"{GATHERED} --zero-stage 1 {FULL} {REUSING}"),
    Case(MANY, Layout(tp=2, ep=2, etp=1), f"{SP} {GATHERED} {PADDED}"),
    Case(MANY, Layout(dp=4, ep=2, etp=2), f"{GATHERED} --zero-stage 2"),
    Case(MANY, Layout(tp=2, pp=2, ep=2, etp=1), f"{SP} {PADDED} --pipeline-schedule zb-v {FULL} {REUSING}"),
]
OPTIMIZERS = [
    (Case(GATED, layout, options), f"--optimizer {name}")
    for layout, options in (
        (Layout(dp=2, ep=2), "--zero-stage 2"),
        (Layout(tp=2, ep=2, etp=1), SP),
        (Layout(tp=2, dp=2, ep=2), f"{SP} --zero-stage 3"),
    )
    for name in ("muon", "lamb", "adafactor")
]


def values_of(case: Case) -> dict[str, set[object]]:
    """What a row is an example of, by factor; under "cut" every way in which it cuts the model or the batch."""
    layout, options = case.layout, case.options
    tensor = {"sp" if SP in options else "tp"} if layout.tp > 1 else set()
    order = "zb-v" if "zb-v" in options else "interleaved" if INTERLEAVED in options else "1f1b"
    pipeline = {order} if layout.pp > 1 and "zb-h1" not in options else set()
    stage = int(options.split("--zero-stage ")[1][0]) if "--zero-stage" in options else 0
    return {
        "ep": {layout.ep},
        "cut": tensor | pipeline or {"dp"},
        "stage of ZeRO": {stage},
        "recomputed": {FULL in options},
        "capacity": {case.model == MANY},
    }


VALUES: dict[str, tuple[object, ...]] = {
    "ep": (2, 4),
    "cut": ("dp", "tp", "sp", "1f1b", "interleaved", "zb-v"),
    "stage of ZeRO": (0, 1, 2, 3),
    "recomputed": (False, True),
    "capacity": (False, True),
}


def test_the_rows_have_each_value_with_each_value_of_every_other_factor() -> None:
    rows = [values_of(case) for case in CASES + MORE]
    for one, other in itertools.combinations(VALUES, 2):
        for pair in itertools.product(VALUES[one], VALUES[other]):
            assert any(pair[0] in row[one] and pair[1] in row[other] for row in rows), f"no row has {one, other} {pair}"


@dataclass(frozen=True)
class Reference:
    """Of one process: what was chosen, and the biases of the routers after the last step."""

    choices: Choices
    biases: dict[str, Tensor]


def biases_of(parts: TrainingSetup) -> dict[str, Tensor]:
    """The declared state of the routers that a rank has."""
    return {name: value.clone() for name, value in parts.states.values().items()}


@functools.cache
def recorded(model: str, options: str = "") -> Reference:
    """The reference of a model, which `compare.reference` trains with these options of its own."""
    made: list[TrainingSetup] = []

    def parts_and_keep(*args: object) -> TrainingSetup:
        made.append(parts_of(*args))
        return made[-1]

    with recording() as record, mock.patch.object(compare, "parts_of", parts_and_keep):
        compare.reference(model, options)
    return Reference(record.choices(), biases_of(made[0]))


def replayed(
    rank: int, world_size: int, cases: list[Case], choices: dict[str, Choices]
) -> list[tuple[Trace, dict[str, Tensor]]]:
    """Body of a worker: traces of cases with the routing of one process, and the biases at the end."""
    found = []
    for case in cases:
        with replaying(choices[case.model]):
            parts = parts_of(case, make_mesh(case.layout))
            found.append((trace(parts, num_steps=case.num_steps), biases_of(parts)))
    return found


@pytest.mark.parity
@pytest.mark.parametrize(
    ("world_size", "batch"),
    [
        *batches(CASES),
        *(
            pytest.param(*one.values, id=f"more-{one.id}", marks=pytest.mark.slow)
            for one in batches(MORE, by_layout=True)
        ),
    ],
)
def test_experts_train_as_in_one_process_at_every_layout(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    references = {model: recorded(model) for model in {case.model for case in batch}}
    choices = {model: one.choices for model, one in references.items()}
    by_rank = pool.run(world_size, replayed, batch, choices, timeout_s=400)
    for number, case in enumerate(batch):
        check_against_one_process(case, [found[number][0] for found in by_rank], parity_table)
        if case.num_steps < len(compare.reference(case.model)[0].losses):
            continue
        for found in by_rank:
            for name, bias in found[number][1].items():
                assert torch.equal(bias, references[case.model].biases[name]), f"{case}: {name}"


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("case", "of_model"), OPTIMIZERS, ids=str)
def test_every_optimizer_sees_experts_as_other_matrices(
    pool: Pool, parity_table: list[str], case: Case, of_model: str
) -> None:
    choices = {case.model: recorded(case.model, of_model).choices}
    case = replace(case, options=f"{case.options} {of_model}")
    by_rank = pool.run(case.layout.world_size, replayed, [case], choices)
    check_against_one_process(case, [found[0][0] for found in by_rank], parity_table, of_model=of_model)


# --- Free routing -----------------------------------------------------------------------------------------------------

FREE = [
    Case(GATED, Layout(dp=2, ep=2), "--zero-stage 1"),
    Case(GATED, Layout(tp=2, ep=2, etp=1), SP),
    Case(GATED, Layout(pp=2), "--pipeline-schedule zb-v"),
    Case(MANY, Layout(tp=2, ep=2, etp=1), SP),
]
MOST_MARGIN = 1e-4


def starts_of_steps(model: str) -> list[dict[str, Tensor]]:
    """The weights and the declared state that each step of one process begins with."""
    starts: list[dict[str, Tensor]] = []

    def keep_and_train(parts: TrainingSetup, *args: object, **options: object) -> StepResult:
        weights = {name: v.data.view(v.full_shape).clone() for name, v in parts.engine.weight_views().items()}
        starts.append(weights | biases_of(parts))
        return train_step(parts, *args, **options)

    with mock.patch.object(runs, "train_step", keep_and_train):
        trace(parts_of(Case(model, Layout()), make_mesh(Layout())))
    return starts


def free_steps(
    rank: int, world_size: int, cases: list[Case], starts: list[dict[str, Tensor]], choices: Choices
) -> list[list[tuple[float, list[float]]]]:
    """Body of a worker: the loss of each step from these starts, and the margins of tokens that went elsewhere."""
    found = []
    for case in cases:
        parts = parts_of(case, make_mesh(case.layout))
        steps = []
        for step, given in enumerate(starts):
            states = parts.states.values()
            assert not fill_views(parts.engine.weight_views(), {n: v for n, v in given.items() if n not in states})
            for name, value in states.items():
                value.copy_(given[name])
            parts.engine.publish()
            parts.engine.finish_publish()
            with noting_flips(choices) as margins:
                (loss,) = trace(parts, num_steps=1, first_step=step).losses
            steps.append((loss, margins))
        found.append(steps)
    return found


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("model", [GATED, MANY])
def test_free_routing_differs_only_where_experts_are_as_good_as_equal(
    pool: Pool, parity_table: list[str], model: str
) -> None:
    starts, choices = starts_of_steps(model), recorded(model).choices
    cases = [case for case in FREE if case.model == model]
    expected = compare.reference(model)[0].losses
    by_rank = pool.run(2, free_steps, cases, starts, choices)
    for number, case in enumerate(cases):
        flips = [margin for steps in by_rank for _, margins in steps[number] for margin in margins]
        parity_table.append(f"{case!s} {len(flips)} tokens went elsewhere, by margins up to {max(flips, default=0.0)}")
        assert all(margin < MOST_MARGIN for margin in flips), f"{case}: {sorted(flips)[-5:]}"
        for step, loss in enumerate(expected):
            if not any(steps[number][step][1] for steps in by_rank):
                assert relative([by_rank[0][number][step][0]], [loss]) < LOSS_TOLERANCE, f"{case}: step {step}"
