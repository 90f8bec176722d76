"""Every order of pipeline work gives the training of one process: losses, norms and gradients.

Where an order only moves work in time (no table is tied between stages, the same micro-batches in the same order),
gradients are the same bit for bit.
"""

from __future__ import annotations

import pytest
import torch

from megatron3d.comm.layout import Layout
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process, reference
from tests.parity.runs import Case, assemble, batches, brief, trace_cases

VIRTUAL2 = "--num-virtual-stages-per-pipeline-rank 2"
PLAIN, SPLIT = ["gpipe", "1f1b"], ["zb-h1", "zb-h2"]
SINGLE = PLAIN + SPLIT
DOUBLE = [f"interleaved {VIRTUAL2}", f"breadth-first {VIRTUAL2}", "zb-v", "dualpipe-v"]
SAME_MICRO_BATCHES = "--micro-batch-size 1"
OWN = "examples/my_pipeline_order.py:last_in_first_out"


def named(order: str, *options: str) -> str:
    """The options of an order and more."""
    return " ".join((f"--pipeline-schedule {order}", *options))


def cases() -> list[Case]:
    """Every order at PP 2 and 4, and each with what it could upset: TP, SP, DP, ZeRO, recomputation, uneven stages.

    At PP 2 each takes all steps, 1F1B and GPipe in test_layouts.py; from there on it has the same work to do in the
    same order, for other stages, and so has an order of a user's own.
    """
    shallow = [Case("llama-tied", Layout(pp=2), named(order)) for order in [*SPLIT, *DOUBLE]]
    again = [Case("llama-tied", Layout(pp=2), named(order)) for order in [*PLAIN, OWN]]
    deep = [Case("gpt2-deep", Layout(pp=4), named(order)) for order in SINGLE + DOUBLE]
    mixed = [
        case
        for order in ["zb-h1", *DOUBLE]
        for case in (
            Case("gpt2", Layout(tp=2, pp=2), named(order, "--sequence-parallel")),
            Case("gpt2", Layout(pp=2, dp=2), named(order, "--zero-stage 1", "--recompute-granularity full")),
        )
    ]
    big = [
        Case("gpt2", Layout(tp=2, pp=2, dp=2), named(order, "--zero-stage 1 --recompute-granularity selective"))
        for order in ["zb-h2", *DOUBLE]
    ]
    sharded = [
        Case("gpt2", Layout(pp=2, dp=2), named("zb-h1", "--zero-stage 2")),
        Case("gpt2", Layout(pp=2, dp=2), named(DOUBLE[0], "--zero-stage 2 --overlap-param-gather")),
        Case("gpt2", Layout(pp=2, dp=2), named("zb-h2", "--zero-stage 3 --recompute-granularity full")),
        Case("gpt2", Layout(pp=2, dp=2), named("zb-v", "--zero-stage 3 --zero-prefetch-units 2")),
        Case("llama", Layout(pp=2, dp=2), named(DOUBLE[1], "--zero-stage 3")),
        Case("llama-tied", Layout(pp=2, dp=2), named("dualpipe-v", "--zero-stage 3 --recompute-granularity selective")),
    ]
    odd = [
        Case("gpt2-deep", Layout(pp=2), f"--num-layers-per-virtual-pipeline-stage 1 {SAME_MICRO_BATCHES}"),
        Case("gpt2-deep", Layout(pp=4), named("zb-v", "--micro-batch-size 8")),  # one micro-batch for eight stages
        Case("gpt2-deep", Layout(pp=4), named(DOUBLE[0], "--micro-batch-size 4")),
        Case("gpt2-deep", Layout(pp=2), "--pipeline-model-parallel-layout Ett|t|t*4|tL"),
        Case("gpt2-deep", Layout(pp=4), named("zb-v", "--pipeline-model-parallel-layout E|tt|t|t|t|t|tt|L")),
        Case("llama", Layout(pp=2), "--pipeline-split-costs 0,1,1,1,1,2"),
        Case(
            "gpt2-deep",
            Layout(pp=2),
            f"{VIRTUAL2} --microbatch-group-size-per-virtual-pipeline-stage 3 {SAME_MICRO_BATCHES}",
        ),
    ]
    return shallow + [brief(case) for case in again + deep + mixed + big + sharded + odd]


SHORT = [Case("llama-tied", Layout(pp=2), named(order)) for order in ("zb-h1", DOUBLE[0], "zb-v")]


def is_slow(case: Case) -> bool:
    """Rows whose parts are in other rows.

    On eight ranks all but the orders of one and of two stages a rank that split the backward, as each pair of axes is
    cut at four. At four, GPipe and 1F1B, which test_layouts.py has, and breadth-first, which sends what the
    interleaved order sends, but for stage 3 of ZeRO.
    """
    words = set(case.options.split())
    if case.layout.world_size == 8:
        return not {"zb-h2", "zb-v"} & words
    if case.layout == Layout(pp=4):
        return bool({*PLAIN} & words)
    return case.layout.world_size == 4 and "breadth-first" in words and "3" not in words  # there with stage 3 of ZeRO


SLOW = list(filter(is_slow, cases()))
BATCHES = batches(cases(), short=SHORT, slow=SLOW)


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), BATCHES)
def test_every_order_gives_the_losses_norms_and_gradients_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=400)
    for number, case in enumerate(batch):
        check_against_one_process(case, [traces_of_rank[number] for traces_of_rank in by_rank], parity_table)


@pytest.mark.parity
def test_untied_gradients_are_those_of_one_process_bit_for_bit_under_every_order(pool: Pool) -> None:
    batch = [Case("llama", Layout(pp=2), named(order, SAME_MICRO_BATCHES), num_steps=1) for order in SINGLE + DOUBLE]
    by_rank = pool.run(2, trace_cases, batch, timeout_s=240)
    shapes = reference("llama")[1]
    whole = assemble(trace_cases(0, 1, [Case("llama", Layout(), SAME_MICRO_BATCHES, num_steps=1)]), shapes)
    for number, case in enumerate(batch):
        got = assemble([traces[number] for traces in by_rank], shapes)
        different = [name for name in shapes if not torch.equal(got[name], whole[name])]
        assert not different, f"{case}: {different}"
