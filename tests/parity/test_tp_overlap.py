"""Products and collectives of tensor parallelism in chunks give the losses, norms and gradients of one process."""

from __future__ import annotations

import pytest

from megatron3d.comm.layout import Layout
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process
from tests.parity.runs import Case, batches, brief, trace_cases

SP = "--sequence-parallel"
OVERLAP = "--tp-comm-overlap"
UNEVEN = f"{OVERLAP} --tp-comm-overlap-chunks 3"
AGAIN = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
REUSED = f"{AGAIN} --recompute-reuse-communication"
ZEROS = "--zero-stage 1 --overlap-param-gather"

CASES = [
    Case("gpt2", Layout(tp=2), f"{SP} {OVERLAP}"),
    brief(Case("llama", Layout(tp=2), f"{UNEVEN} {AGAIN}")),
    brief(Case("llama", Layout(tp=2), f"{SP} {UNEVEN} {REUSED}")),
    brief(Case("gpt2", Layout(tp=2), f"{OVERLAP} {REUSED}")),
    brief(Case("gpt2-mixed", Layout(tp=2), f"{SP} {UNEVEN}")),
    brief(Case("bert", Layout(tp=2), f"{SP} {OVERLAP}")),
    brief(Case("llama", Layout(tp=4), f"{SP} {OVERLAP}")),
    brief(Case("gpt2", Layout(tp=2, pp=2), f"{SP} {UNEVEN} --pipeline-schedule zb-h1")),
    brief(Case("gpt2", Layout(tp=2, pp=2), f"{OVERLAP} --pipeline-schedule zb-v")),
    brief(Case("bert", Layout(tp=2, pp=2), f"{OVERLAP} --pipeline-schedule zb-h1")),
    brief(Case("llama", Layout(tp=2, cp=2), f"{SP} {OVERLAP}")),
    brief(Case("gpt2", Layout(tp=2, dp=2), f"{SP} {OVERLAP} {ZEROS}")),
    brief(Case("gpt2", Layout(tp=2, dp=2), f"{SP} {UNEVEN} --zero-stage 3")),
    brief(Case("experts-many", Layout(tp=2, dp=2, ep=2), f"{SP} {OVERLAP}")),
]
USUAL = [CASES[0], CASES[2], CASES[7]]
SLOW = [case for case in CASES if case not in USUAL]
BATCHES = batches(CASES, slow=SLOW)


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), BATCHES)
def test_chunks_give_the_losses_norms_and_gradients_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=240)
    for number, case in enumerate(batch):
        check_against_one_process(case, [traces[number] for traces in by_rank], parity_table)
