"""More tensor-parallel ranks than key and value heads: ranks share a head, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.optim.schedule import settings_from_config
from megatron3d.params.boxes import Box
from megatron3d.train import state
from megatron3d.train.state import Progress
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process, reference
from tests.parity.runs import Case, Trace, assemble, brief, parts_of, trace, trace_cases
from tests.parity.test_zero import held

SP = "--sequence-parallel"
TP4 = Layout(tp=4, kv_copies=2)  # of 4 query heads and 2 key and value heads a rank has one and half a one
CASES = [
    Case("llama-gqa", TP4),
    brief(Case("llama-gqa", TP4, f"{SP} --recompute-granularity full")),
    brief(Case("gpt2-mqa", Layout(tp=2, pp=2, kv_copies=2), f"{SP} --pipeline-schedule zb-h1")),
]


@pytest.mark.parity
def test_heads_shared_by_ranks_give_the_results_of_one_process(pool: Pool, parity_table: list[str]) -> None:
    by_rank = pool.run(4, trace_cases, CASES)
    for number, case in enumerate(CASES):
        check_against_one_process(case, [traces[number] for traces in by_rank], parity_table)


def _move(rank: int, world_size: int, directory: str) -> list[dict[str, list[tuple[Box, Tensor]]]]:
    """Train and save where ranks share heads, and load where they do not, and back."""
    found = []
    for number, layout in enumerate((TP4, Layout(tp=2, dp=2), TP4)):
        options = f"--load {directory}/{number - 1} " if number else ""
        parts = parts_of(Case("llama-gqa", layout, f"{options}--save {directory}/{number}"), make_mesh(layout))
        if number:
            state.restore(parts)
        else:
            trace(parts, num_steps=2)
        state.save(parts, Progress(step=2 + number), settings_from_config(parts.config.optim, parts.config.train))
        found.append(held(parts))
    return found


def test_a_checkpoint_moves_to_ranks_that_share_heads_and_back_bit_for_bit(pool: Pool, tmp_path: Path) -> None:
    by_rank = pool.run(4, _move, str(tmp_path))
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    shapes = {f"{kind}/{name}": shape for kind in kinds for name, shape in reference("llama-gqa")[1].items()}
    first, *others = (assemble([Trace([], [], rank[i]) for rank in by_rank], shapes) for i in range(3))
    assert not any(tensor.isnan().any() for tensor in first.values())
    for moved in others:
        assert all(torch.equal(moved[name], first[name]) for name in shapes)
