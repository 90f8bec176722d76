"""Dropout inside the promise: with 0.1 of hidden elements and of attention probabilities dropped, the layout still
changes no loss, gradient norm or gradient.

Rows as in `test_layouts.py`, against one process that takes the batch at once: 20 steps of a GPT at TP, SP, DP and PP,
few of what else the mask must not depend on.
"""

from __future__ import annotations

from itertools import groupby

import pytest

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from tests.dist.pool import Pool
from tests.parity.compare import LOSS_TOLERANCE, check_against_one_process, reference, relative
from tests.parity.runs import Case, brief, parts_of, trace, trace_cases

SP, ZERO1, ZERO3 = "--sequence-parallel", "--zero-stage 1", "--zero-stage 3"
SELECTIVE, FULL = "--recompute-granularity selective", "--recompute-granularity full"

# On layouts of several ranks a micro-batch has two samples, see `runs.config_of`.
CASES = [
    brief(Case("gpt2-drops", Layout(tp=2))),
    Case("gpt2-drops", Layout(tp=2), f"{SP} {SELECTIVE}"),
    brief(Case("gpt2-drops", Layout(dp=2), ZERO1)),
    Case("gpt2-drops", Layout(pp=2)),
    brief(Case("bert-drops", Layout(tp=2), SP)),
    brief(Case("bert-drops", Layout(pp=2), "--pipeline-schedule zb-h1")),
    brief(Case("bert-drops", Layout(dp=2), f"{ZERO3} {FULL}")),
    brief(Case("llama-drops", Layout(tp=2, pp=2), f"{SP} --pipeline-schedule zb-v")),
]
BATCHES = [
    pytest.param(size, list(group), id=f"world{size}")
    for size, group in groupby(CASES, key=lambda case: case.layout.world_size)
]


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), BATCHES)
def test_dropout_keeps_the_losses_norms_and_gradients_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=240)
    for number, case in enumerate(batch):
        check_against_one_process(case, [traces_of_rank[number] for traces_of_rank in by_rank], parity_table)


@pytest.mark.parity
def test_micro_batch_size_and_recomputation_drop_what_one_process_drops(parity_table: list[str]) -> None:
    case = Case("gpt2-drops", Layout(), f"--micro-batch-size 4 {SELECTIVE}")
    check_against_one_process(case, [trace(parts_of(case, make_mesh(Layout())))], parity_table)


def test_the_rows_really_drop() -> None:
    dropped, whole = (reference(model)[0].losses for model in ("gpt2-drops", "gpt2"))
    assert relative(dropped, whole) > 100 * LOSS_TOLERANCE
