"""Parameters of two kinds in each block train as parameters of one: only who sums what is asked of the kind.

The MLPs are declared as parameters of experts. Without a grid of experts of its own a layout gives these the same ranks
as all others, so every result must stay; units, gates, norms, optimizers and reports see two kinds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron3d.comm.layout import Layout
from megatron3d.nn import block
from megatron3d.nn.mlp import MLP
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process
from tests.parity.runs import Case, Trace, brief, trace_cases


class ExpertMLP(MLP):
    """An MLP whose parameters are of the kind "expert"."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        for linear in (self.up, self.down):
            linear.specs = {name: replace(spec, kind="expert") for name, spec in linear.specs.items()}


SP = "--sequence-parallel"
CASES = [
    Case("llama", Layout(dp=2), "--zero-stage 3"),
    brief(Case("gpt2", Layout(dp=2), "--zero-stage 2 --recompute-granularity full")),
    brief(Case("gpt2", Layout(tp=2), SP)),
    brief(Case("llama", Layout(pp=2), "--pipeline-schedule zb-h1")),
]


def _traces(rank: int, world_size: int, cases: list[Case]) -> list[Trace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "MLP", ExpertMLP)
        return trace_cases(rank, world_size, cases)


@pytest.mark.parity
def test_two_kinds_of_parameters_in_a_block_train_as_one(pool: Pool, parity_table: list[str]) -> None:
    by_rank = pool.run(2, _traces, CASES)
    for number, case in enumerate(CASES):
        check_against_one_process(case, [traces[number] for traces in by_rank], parity_table)
