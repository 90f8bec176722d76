"""Heads and ranks that do not fit the kinds of attention over context-parallel ranks: sentences at the start."""

from __future__ import annotations

import pytest

from megatron3d.config.check import check
from megatron3d.config.cli import parse_args
from megatron3d.config.derive import derive
from megatron3d.planner.layout import layout_of

SHAPE = (
    "--num-layers 2 --hidden-size 96 --num-attention-heads 12 --seq-length 64 --micro-batch-size 2 --lr 1e-3 "
    "--train-iters 10 --vocab-size 100 --mock-data --attention-dropout 0"
)


def _problems(change: str, world_size: int) -> list[str]:
    given = parse_args(f"{SHAPE} {change}".split(), program="t", description="t", log=print)
    return check(given, world_size)


@pytest.mark.parametrize(
    ("change", "world_size", "sentence"),
    [
        (
            "--context-parallel-size 8 --cp-comm-type a2a",
            8,
            "--cp-comm-type a2a with --context-parallel-size 8 gives whole heads to each of 8 ranks, and "
            "--num-attention-heads 12, which are 12, do not divide among them; exchange heads among 4 ranks at most",
        ),
        (
            "--context-parallel-size 4 --tensor-model-parallel-size 2 --cp-comm-type allgather a2a",
            8,
            "--num-attention-heads 12, which are 6 on each of --tensor-model-parallel-size 2 ranks, do not divide",
        ),
        (
            "--context-parallel-size 4 --cp-comm-type a2a --num-query-groups 6",
            4,
            "--num-query-groups 6, which are 6, neither divide among the ranks nor divide their number",
        ),
        (
            "--context-parallel-size 4 --cp-comm-type a2a+p2p",
            4,
            "--cp-comm-type a2a+p2p needs --hierarchical-context-parallel-sizes; give the ranks that exchange heads "
            "and the groups that pass keys round, such as --hierarchical-context-parallel-sizes 2 2",
        ),
        (
            "--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 4 2",
            4,
            "--hierarchical-context-parallel-sizes 4 2 makes 8 ranks and not --context-parallel-size 4",
        ),
        (
            "--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 x",
            4,
            "--hierarchical-context-parallel-sizes 2 x is not two whole numbers above 0",
        ),
        (
            "--context-parallel-size 8 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 8 1",
            8,
            "--hierarchical-context-parallel-sizes 8 1 gives whole heads to each of 8 ranks",
        ),
        (
            "--context-parallel-size 4 --cp-comm-type p2p a2a --cp-gather-again",
            4,
            "--cp-gather-again is about --cp-comm-type allgather, and no layer has it with p2p a2a; leave it out",
        ),
        (
            "--context-parallel-size 4 --cp-comm-type p2p --hierarchical-context-parallel-sizes 2 2",
            4,
            "--hierarchical-context-parallel-sizes 2 2 is about --cp-comm-type a2a+p2p, which no layer has",
        ),
        (
            "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes x",
            1,
            "--hierarchical-context-parallel-sizes x is not two whole numbers above 0",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(change: str, world_size: int, sentence: str) -> None:
    problems = _problems(change, world_size)
    assert len(problems) == 1 and sentence in problems[0], problems


@pytest.mark.parametrize(
    ("change", "cp_heads"),
    [
        ("--cp-comm-type a2a --num-query-groups 2", 1),  # a key and value head for two ranks each
        ("--cp-comm-type p2p a2a+p2p --hierarchical-context-parallel-sizes 2 2", 2),
        ("--cp-comm-type p2p --num-query-groups 6", 1),
    ],
)
def test_what_fits_has_no_problem_and_its_axes(change: str, cp_heads: int) -> None:
    change = f"{change} --context-parallel-size 4"
    assert _problems(change, 4) == []
    given = parse_args(f"{SHAPE} {change}".split(), program="t", description="t", log=print)
    assert layout_of(derive(given, 4).parallel).size("cp_heads") == cp_heads


@pytest.mark.parametrize("sizes", ["", "--hierarchical-context-parallel-sizes 2 2"])
def test_one_rank_takes_the_launch_script_of_more(sizes: str) -> None:
    given = parse_args(f"{SHAPE} --cp-comm-type a2a+p2p {sizes}".split(), program="t", description="t", log=print)
    assert check(given, 1) == []
    assert layout_of(derive(given, 1).parallel).size("cp_heads") == 1
