"""What makes room for long sequences on one device changes no result, at no layout: the rows of the parity table.

A row combines the options, since each of them is also held alone against the same arithmetic in one process
(`tests/tensor/test_chunked_loss.py`).
"""

from __future__ import annotations

import pytest

from megatron3d.comm.layout import Layout
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process
from tests.parity.runs import Case, batches, brief, trace_cases

SP = "--sequence-parallel"
# Of micro-batches of 32 or 64 tokens: two or three chunks of the loss. Of 16 positions, or 8 of them: 5, 5 and 6.
CHUNKS = "--loss-chunk-size 24 --mlp-chunks-for-training 3"
ZB = "--pipeline-schedule zb-h1"


def cases() -> list[Case]:
    """Each of the ways in which weights, gradients and activations come and go, with each kind of head and MLP."""
    pairs = [
        Case("gpt2", Layout(tp=2), f"{SP} {CHUNKS}"),
        Case("llama", Layout(tp=2), CHUNKS),
        Case("bert", Layout(tp=2), f"{SP} {CHUNKS}"),
        Case("gpt2", Layout(pp=2), f"{ZB} {CHUNKS}"),
        Case("gpt2-words", Layout(cp=2), f"--zero-stage 3 {CHUNKS}"),
        Case("gpt2-words", Layout(pp=2, dp=2), f"--zero-stage 3 {ZB} {CHUNKS}"),
        Case("llama", Layout(tp=2, pp=2), f"{SP} {ZB} {CHUNKS}"),
        Case("gpt2-mixed", Layout(tp=2, pp=2), f"{ZB} {CHUNKS}"),
        Case("bert", Layout(dp=2), f"--zero-stage 3 {CHUNKS}"),
        Case("gpt2", Layout(tp=2, cp=2), f"{SP} --zero-stage 2 {CHUNKS}"),
    ]
    return [brief(case) for case in pairs]


SLOW = [case for case in cases() if case.layout.world_size > 2 or (case.model, case.layout.dp) == ("bert", 2)]


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), batches(cases(), slow=SLOW))
def test_room_for_long_sequences_gives_the_results_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=240)
    for number, case in enumerate(batch):
        check_against_one_process(case, [traces_of_rank[number] for traces_of_rank in by_rank], parity_table)
