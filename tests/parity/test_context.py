"""Rows of the layout-parity table: samples cut over context-parallel ranks.

Default rows have each cut, layout, schedule, ZeRO stage and kind of documents at least once; the slow ones are further
combinations (`test_context_rows.py` counts the pairs). Runs that are cut in a wrong way must not pass the comparison.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.data.batch import Batch, Samples
from megatron3d.nn.context import shards
from megatron3d.train import context
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process
from tests.parity.runs import Case, Trace, batches, brief, trace_cases

PACKED = "--reset-attention-mask --reset-position-ids"
DROPS = "--hidden-dropout 0.1"
BY_POSITION = "--moe-token-drop-policy position"
LTD = (  # of samples that are longer from step to step
    f"--seq-length 64 --random-ltd --random-ltd-min 16 --random-ltd-steps 8 {DROPS} "
    "--seq-length-curriculum truncate --seq-length-curriculum-min-difficulty 32 --seq-length-curriculum-steps 3 "
    "--seq-length-curriculum-difficulty-step 8"
)
OF_MODEL = (PACKED, DROPS, LTD, BY_POSITION)  # what the one process takes too, where it begins the options of a case
SP = "--sequence-parallel"

CASES = [
    Case("gpt2", Layout(cp=2)),
    brief(Case("llama-gqa", Layout(cp=2), f"{PACKED} --zero-stage 1 --recompute-granularity selective")),
    brief(Case("bert", Layout(cp=2), "--zero-stage 2")),
    brief(Case("llama-gqa", Layout(cp=4), "--zero-stage 3 --cp-gather-again --recompute-granularity full")),
    brief(Case("experts-many", Layout(cp=2, ep=2), BY_POSITION)),
    brief(Case("llama-gqa", Layout(cp=2), f"{LTD} --recompute-granularity full")),
    brief(Case("gpt2", Layout(tp=2, cp=2), f"{DROPS} {SP} --zero-stage 2")),
    brief(Case("gpt2", Layout(pp=2, cp=2), f"{PACKED} --pipeline-schedule zb-h1 --cp-cut zigzag")),
]
SLOW = [
    Case("llama-gqa", Layout(cp=2), f"{PACKED} --cp-cut contiguous"),
    Case("bert-post", Layout(cp=2), "--cp-cut zigzag --recompute-granularity full"),
    Case("gpt2", Layout(cp=4), f"{PACKED} --zero-stage 3 --cp-gather-again"),
    Case("bert", Layout(tp=2, cp=2), f"{SP} --zero-stage 1"),
    Case("bert", Layout(cp=4), "--zero-stage 3"),
    Case("gpt2", Layout(dp=2, cp=2, zero_shard=2), f"{DROPS} --zero-stage 2 --zero-shard-size 2"),
    Case("llama-gqa", Layout(dp=2, cp=2), f"{PACKED} --zero-stage 3 --overlap-param-gather"),
    Case("llama-tied", Layout(pp=2, cp=2), "--pipeline-schedule zb-v --zero-stage 1"),
    Case("gpt2", Layout(pp=2, cp=2), "--num-virtual-stages-per-pipeline-rank 2 --recompute-granularity full"),
    Case("llama-gqa", Layout(tp=2, cp=2), f"{LTD} {SP}"),
    Case("gpt2", Layout(cp=4), f"{LTD} --cp-cut contiguous"),
    Case("experts-many", Layout(cp=4), "--cp-cut contiguous --zero-stage 1"),
    Case("experts-many", Layout(tp=2, cp=2, ep=2), SP),
    Case(
        "experts-many", Layout(tp=2, cp=2, ep=4, etp=1), "--recompute-granularity full --recompute-reuse-communication"
    ),
    Case("experts", Layout(dp=2, cp=2, ep=4), "--zero-stage 3 --moe-token-dispatcher-type allgather"),
    Case("gpt2-mqa", Layout(tp=2, cp=2, kv_copies=2), f"{PACKED} --zero-stage 3"),
]


def _of_model(case: Case) -> str:
    return next((options for options in OF_MODEL if case.options.startswith(options)), "")


@pytest.mark.parametrize(("world_size", "cases"), batches(CASES) + batches(SLOW, slow=SLOW, by_layout=True))
def test_samples_cut_over_ranks_train_as_in_one_process(
    pool: Pool, parity_table: list[str], world_size: int, cases: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, cases, timeout_s=300)
    for number, case in enumerate(cases):
        traces = [traces[number] for traces in by_rank]
        check_against_one_process(case, traces, parity_table, of_model=_of_model(case))


def _shift_after_the_cut(samples: Samples, positions_BL: Tensor) -> dict[str, Tensor]:
    """Labels made of the tokens that follow on the rank, as frameworks do that shift what they have cut."""
    fields = _AT(samples, positions_BL)
    assert isinstance(samples, Batch)
    return fields | {"labels_BS": fields["tokens_BS"].roll(-1, dims=1)}


def _positions_of_the_rank(*args: object, **given: object) -> shards.ContextShards:
    """Positions that count from 0 on every rank."""
    found = _SHARDS_OF(*args, **given)  # pyright: ignore[reportArgumentType]
    return replace(found, positions_BL=found.positions_BL.argsort(dim=1))


_AT, _SHARDS_OF = context._at, shards.shards_of
WRONG = {
    "labels are shifted after the cut": ("_at", _shift_after_the_cut),
    "positions are those of the rank": ("shards_of", _positions_of_the_rank),
}


def _trace_wrong(rank: int, world_size: int, case: Case, wrong: str) -> Trace:
    name, changed = WRONG[wrong]
    with mock.patch.object(context, name, changed):
        return trace_cases(rank, world_size, [case])[0]


@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_sees_when(pool: Pool, wrong: str) -> None:
    case = replace(brief(Case("gpt2", Layout(cp=2))), num_steps=1)
    traces = pool.run(2, _trace_wrong, case, wrong)
    with pytest.raises(AssertionError, match="losses differ"):
        check_against_one_process(case, traces, [])
