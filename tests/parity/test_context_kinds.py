"""Rows of the layout-parity table: every kind of attention over context-parallel ranks, beside other parallelism."""

from __future__ import annotations

import pytest

from megatron3d.comm.layout import Layout
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process
from tests.parity.runs import Case, batches, brief, trace_cases

SP = "--sequence-parallel"
CP2, CP4, CP2X2 = Layout(cp=2), Layout(cp=4), Layout(cp=4, cp_heads=2)
RING, HEADS, BOTH = (f"--cp-comm-type {kind}" for kind in ("p2p", "a2a", "a2a+p2p"))
BOTH += " --hierarchical-context-parallel-sizes 2 2"

ROWS = [
    brief(Case("llama-gqa", CP2, f"{RING} --recompute-granularity full --recompute-reuse-communication")),
    brief(Case("gpt2-mqa", CP4, f"{HEADS} --cp-cut contiguous --zero-stage 3")),
    brief(Case("llama-gqa", CP2X2, f"{BOTH} --zero-stage 1 --recompute-granularity selective")),
    brief(Case("gpt2", Layout(pp=2, cp=2), "--cp-comm-type a2a p2p allgather p2p --pipeline-schedule zb-h1")),
    brief(Case("llama-gqa", Layout(tp=2, cp=2), f"{RING} {SP} --zero-stage 2")),
]
SLOW = [
    Case("llama-gqa", CP2, f"{RING} --cp-cut contiguous"),
    Case("gpt2", CP2, f"{HEADS} --recompute-granularity full --recompute-reuse-communication"),
    Case("bert", CP2, RING),
    Case("bert-masked", CP2, HEADS),
    Case("llama-gqa", CP4, RING),
    Case("gpt2-mqa", CP2X2, f"{BOTH} --recompute-granularity full"),
    Case("bert", CP2X2, BOTH),
    Case("llama-gqa", Layout(tp=2, cp=2), f"{HEADS} {SP} --recompute-granularity full --recompute-reuse-communication"),
    Case("llama-gqa", Layout(pp=2, cp=2), f"{RING} --pipeline-schedule zb-v"),
    Case("gpt2", Layout(pp=2, cp=2), f"{HEADS} --pipeline-schedule interleaved --zero-stage 1"),
    Case("gpt2", Layout(dp=2, cp=2), f"{RING} --zero-stage 3"),
]
PACKED = "--reset-attention-mask --reset-position-ids"
PACKED_ROWS = [brief(Case("llama-gqa", CP2, f"{RING} {PACKED}"))]
PACKED_SLOW = [
    Case("llama-gqa", CP4, f"{RING} {PACKED}"),
    Case("llama-gqa", CP4, f"{HEADS} {PACKED} --cp-cut zigzag"),
    Case("gpt2", CP2X2, f"{BOTH} {PACKED}"),
]


@pytest.mark.parametrize(("world_size", "cases"), batches([*ROWS, *SLOW], slow=SLOW))
def test_every_kind_trains_as_one_process(
    pool: Pool, parity_table: list[str], world_size: int, cases: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, cases, timeout_s=300)
    for number, case in enumerate(cases):
        check_against_one_process(case, [traces[number] for traces in by_rank], parity_table)


@pytest.mark.parametrize(("world_size", "cases"), batches([*PACKED_ROWS, *PACKED_SLOW], slow=PACKED_SLOW))
def test_every_kind_trains_on_packed_documents_as_one_process(
    pool: Pool, parity_table: list[str], world_size: int, cases: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, cases, timeout_s=300)
    for number, case in enumerate(cases):
        check_against_one_process(case, [traces[number] for traces in by_rank], parity_table, of_model=PACKED)
