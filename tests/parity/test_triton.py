"""The Triton kernels (`--kernels triton`), through Triton's interpreter, train as one process does with plain torch."""

from __future__ import annotations

import pytest

from megatron3d.comm.layout import Layout
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process
from tests.parity.runs import Case, batches, trace_cases

pytest.importorskip("triton", reason="needs the triton package")

TRITON = "--kernels triton"
NUM_STEPS = 2  # the interpreter takes a minute for four: gradients, and losses before and after an update
CASES = [
    Case("gpt2-1p-heads", Layout(), TRITON, NUM_STEPS),
    Case("llama", Layout(), TRITON, NUM_STEPS),
    Case("gpt2-drops", Layout(tp=2), f"{TRITON} --sequence-parallel --recompute-granularity full", NUM_STEPS),
    Case("llama-gqa", Layout(dp=2), f"{TRITON} --zero-stage 3", NUM_STEPS),
]


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), batches(CASES))
def test_triton_kernels_give_the_training_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=600)
    for number, case in enumerate(batch):
        check_against_one_process(case, [of_rank[number] for of_rank in by_rank], parity_table)
