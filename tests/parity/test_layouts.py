"""The promise: the layout changes speed and memory, never the result.

Every case trains in fp32 without dropout and is compared with one process: every loss, every gradient norm, and every
element of the first step's gradients. A GPT-2 takes 20 steps at every layout; a Llama does with TP alone and DP alone
and is brief elsewhere, as the layout is the GPT-2's. What combines at eight ranks what others combine at four, and a
Llama where both it and the layout are in other rows, is slow.
"""

from __future__ import annotations

import pytest

from megatron3d.comm.layout import Layout
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process, reference
from tests.parity.runs import MODELS, Case, batches, brief, trace_cases

SP = "--sequence-parallel"
ZERO1 = "--zero-stage 1"
GPIPE = "--pipeline-schedule gpipe"

LAYOUTS = [
    (Layout(tp=2), ""),
    (Layout(tp=2), SP),
    (Layout(pp=2), ""),
    (Layout(pp=2), GPIPE),
    (Layout(dp=2), ""),
    (Layout(dp=2), ZERO1),
    (Layout(tp=4), SP),
    (Layout(pp=4), ""),
    (Layout(dp=4), ZERO1),
    (Layout(tp=2, pp=2), SP),
    (Layout(tp=2, dp=2), f"{SP} {ZERO1}"),
    (Layout(pp=2, dp=2), ZERO1),
    (Layout(tp=2, pp=2, dp=2), ""),
    (Layout(tp=2, pp=2, dp=2), f"{SP} {ZERO1}"),
    (Layout(tp=4, pp=2), SP),
    (Layout(pp=4, dp=2), ZERO1),  # 4 micro-batches for 4 stages
    (Layout(pp=2, dp=4), f"{ZERO1} --no-overlap-grad-reduce"),  # 2 micro-batches
    (Layout(tp=2, dp=4), SP),
    (Layout(dp=8), ZERO1),
]
# Layouts that are there with other options too, which a GPT-2 trains for all steps.
AGAIN = [(Layout(pp=2), GPIPE), (Layout(tp=2, pp=2, dp=2), "")]
# Where a Llama takes all steps. At the other layouts of two ranks only the GPT-2 does.
WHOLE_LLAMA = [(Layout(tp=2), ""), (Layout(dp=2), ""), (Layout(pp=2), GPIPE)]

SHORT = [
    Case("llama", Layout(tp=2)),
    Case("gpt2", Layout(tp=2), SP),
    Case("gpt2", Layout(pp=2)),
    Case("llama", Layout(dp=2)),
    Case("gpt2", Layout(dp=2), ZERO1),
    brief(Case("llama", Layout(tp=2, pp=2), SP)),
]


def cases() -> list[Case]:
    """GPT-2-like tied and Llama-like untied nearly everywhere; the other two where the embedding's ends matter, which
    are two stages whatever else is cut, at most in two. Other orders than 1F1B are in test_schedules.py."""
    tied = [Case("gpt2", layout, options) for layout, options in LAYOUTS if (layout, options) not in AGAIN]
    # Not at TP 4 x PP 2, the slowest by far: four ways of TP are also without PP.
    untied = [Case("llama", layout, options) for layout, options in LAYOUTS if layout != Layout(tp=4, pp=2)]
    ends = [
        Case(m, layout, o)
        for layout, o in LAYOUTS
        if layout.pp > 1 and layout.world_size <= 4
        for m in ("gpt2-untied", "llama-tied")
    ]
    uneven = [
        Case("gpt2", Layout(pp=2), "--decoder-first-pipeline-num-layers 1"),
        Case("llama", Layout(tp=2, pp=2), f"--decoder-last-pipeline-num-layers 1 {SP}"),
        Case("gpt2-1p", Layout(tp=2, pp=2), SP),
    ]
    whole = [case for case in untied if (case.layout, case.options) in WHOLE_LLAMA]
    again = [Case("gpt2", layout, options) for layout, options in AGAIN]
    return [*tied, *whole, *map(brief, [*again, *(case for case in untied if case not in whole), *ends, *uneven])]


def is_slow(case: Case) -> bool:
    """Eight ranks but for all axes at once; other models than GPT-2 at four but where tensors and batches are cut."""
    layout = case.layout
    if layout.world_size == 8:
        return (case.model, case.options) != ("gpt2", f"{SP} {ZERO1}")
    if case.model == "llama":
        return layout.world_size == 4 and layout.tp != 2
    return case.model in ("gpt2-untied", "llama-tied") and (layout.pp == 4 or case.options == GPIPE)


BATCHES = batches(cases(), short=SHORT, slow=list(filter(is_slow, cases())), by_layout=True)


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), BATCHES)
def test_layout_gives_the_losses_norms_and_gradients_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=240)
    for number, case in enumerate(batch):
        check_against_one_process(case, [traces_of_rank[number] for traces_of_rank in by_rank], parity_table)


@pytest.mark.parametrize("model", MODELS)
def test_one_process_learns(model: str) -> None:
    losses = reference(model)[0].losses
    assert losses[-1] < losses[0] - 0.1, f"the reference that layouts are compared with does not learn: {losses}"
