"""Blocks that torch.compile makes (`--compile`) train as one process does whose blocks run as they are written."""

from __future__ import annotations

import pytest
import torch._dynamo

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process
from tests.parity.runs import Case, Trace, batches, brief, parts_of, trace

SP = "--sequence-parallel"
COMPILE = "--compile"


def cases() -> list[Case]:
    """All steps for each model on one rank; then what changes around a block: collectives, orders, weights that come
    and go, a second forward, masks by place, experts, norms behind the sums."""
    alone = [Case("gpt2", Layout()), Case("llama", Layout())]
    around = [
        Case("gpt2-drops", Layout(), "--micro-batch-size 1"),
        Case("llama-gqa", Layout(), "--recompute-granularity selective"),
        Case("gpt2-1p", Layout(), "--mlp-chunks-for-training 2"),
        Case("gpt2-mixed", Layout()),
        Case("llama", Layout(tp=2)),
        Case("gpt2", Layout(tp=2), SP),
        Case("llama-drops", Layout(tp=2), f"{SP} --recompute-granularity full"),
        Case("gpt2", Layout(tp=2), f"{SP} --recompute-granularity full --recompute-reuse-communication"),
        Case("llama", Layout(tp=2), f"{SP} --tp-comm-overlap"),
        Case("gpt2", Layout(pp=2)),
        Case("llama", Layout(pp=2), "--pipeline-schedule zb-h1 --recompute-granularity full"),
        Case("llama-tied", Layout(pp=2), "--pipeline-schedule zb-v"),
        Case("gpt2", Layout(dp=2), "--zero-stage 3"),
        Case("llama", Layout(dp=2), "--zero-stage 3 --recompute-granularity full"),
        Case("llama-tied", Layout(cp=2)),
        Case("experts", Layout(dp=2, ep=2)),
        Case("bert-post", Layout(dp=2)),
    ]
    return [*alone, *map(brief, around)]


def with_compile(case: Case) -> Case:
    """The case with compiled blocks."""
    return Case(case.model, case.layout, f"{case.options} {COMPILE}", case.num_steps)


def trace_compiled(rank: int, world_size: int, cases: list[Case]) -> list[tuple[Trace, list[str]]]:
    """Body of a worker: the traces of several cases, and what the compiler reported."""
    found = []
    for case in map(with_compile, cases):
        torch._dynamo.reset()  # else the kinds of blocks of all cases count as variants of one
        parts = parts_of(case, make_mesh(case.layout))
        of_case = trace(parts, num_steps=case.num_steps)
        assert parts.compiled is not None, case
        found.append((of_case, parts.compiled.news(case.num_steps)))
    return found


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), batches(cases()))
def test_compiled_blocks_give_the_training_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_compiled, batch, timeout_s=600)
    for number, case in enumerate(batch):
        found = [of_rank[number] for of_rank in by_rank]
        check_against_one_process(with_compile(case), [one for one, _ in found], parity_table)
        assert all(lines and " graphs in " in lines[0] for _, lines in found), f"{case}: nothing was compiled, {found}"
