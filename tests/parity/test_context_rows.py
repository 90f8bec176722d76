"""Rows of the layout-parity table that complete those of `test_context.py` and `test_context_kinds.py`: together they
have each kind of attention, each cut and each part of a layout with each of every other, on at most four ranks."""

from __future__ import annotations

import itertools

import pytest

from megatron3d.comm.layout import Layout
from tests.dist.pool import Pool
from tests.parity import test_context, test_context_kinds
from tests.parity.compare import check_against_one_process
from tests.parity.runs import BERTS, Case, batches, trace_cases

PACKED = "--reset-attention-mask --reset-position-ids"
SP = "--sequence-parallel"
BOTH = "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"

MORE = [
    Case("bert", Layout(dp=2, cp=2), "--cp-comm-type a2a --cp-cut zigzag"),
    Case("bert", Layout(pp=2, cp=2), "--cp-comm-type a2a --zero-stage 2 --pipeline-schedule zb-h1"),
    Case("bert", Layout(pp=2, cp=2), "--zero-stage 1"),
    Case("bert", Layout(tp=2, cp=2), "--cp-comm-type p2p --zero-stage 1"),
    Case("gpt2", Layout(cp=4), "--cp-comm-type a2a --cp-cut balanced --zero-stage 2"),
    Case("gpt2-mqa", Layout(dp=2, cp=2), f"{PACKED} --cp-comm-type p2p --cp-cut contiguous --zero-stage 1"),
    Case("gpt2-mqa", Layout(pp=2, cp=2), f"{PACKED} --cp-comm-type p2p --zero-stage 2"),
    Case("gpt2-mqa", Layout(pp=2, cp=2), f"{PACKED} --cp-comm-type p2p --zero-stage 3 --pipeline-schedule zb-v"),
    Case("gpt2-mqa", Layout(tp=2, cp=2, kv_copies=2), f"{PACKED} {SP} --cp-comm-type p2p --zero-stage 3"),
    Case("llama-gqa", Layout(cp=4, cp_heads=2), f"{BOTH} --cp-cut balanced --zero-stage 3"),
    Case("llama-gqa", Layout(pp=2, cp=2), f"{PACKED} --cp-cut contiguous --zero-stage 3"),
    Case("llama-gqa", Layout(tp=2, cp=2), "--cp-comm-type a2a --cp-cut balanced --zero-stage 2"),
]


def values_of(case: Case) -> dict[str, set[str]]:
    """What a row is an example of, by factor."""
    layout, options = case.layout, case.options
    words = options.split()
    tensor = {"sp" if SP in words else "tp"} if layout.tp > 1 else set()
    pipeline = {"zero-bubble" if "zb-" in options else "1f1b"} if layout.pp > 1 else set()
    documents = "padded" if case.model in BERTS else "packed" if PACKED in options else "one"
    cut = {"padded": "contiguous", "packed": "balanced", "one": "zigzag"}[documents]
    return {
        "ranks": {str(layout.cp)},
        "kind": set(_given(words, "--cp-comm-type") or ["allgather"]),
        "cut": {*(_given(words, "--cp-cut") or [cut])},
        "beside": tensor | pipeline or {"dp" if layout.dp > 1 else "alone"},
        "stage of ZeRO": {*(_given(words, "--zero-stage") or ["0"])},
        "heads": {{"llama-gqa": "shared by two", "gpt2-mqa": "shared by all"}.get(case.model, "own")},
        "documents": {documents},
    }


def _given(words: list[str], option: str) -> list[str]:
    """The values of an option."""
    if option not in words:
        return []
    return [*itertools.takewhile(lambda word: not word.startswith("--"), words[words.index(option) + 1 :])]


VALUES: dict[str, tuple[str, ...]] = {
    "ranks": ("2", "4"),
    "kind": ("allgather", "p2p", "a2a", "a2a+p2p"),
    "cut": ("contiguous", "zigzag", "balanced"),
    "beside": ("alone", "dp", "tp", "sp", "1f1b", "zero-bubble"),
    "stage of ZeRO": ("0", "1", "2", "3"),
    "heads": ("own", "shared by two", "shared by all"),
    "documents": ("one", "packed", "padded"),
}
NOT_TOGETHER = {  # what is refused, what four ranks do not hold, and heads that no BERT of the table shares
    ("a2a+p2p", "2"),
    *itertools.product(("4", "a2a+p2p"), ("dp", "tp", "sp", "1f1b", "zero-bubble")),
    ("balanced", "padded"),
    ("shared by two", "padded"),
    ("shared by all", "padded"),
}


def missing_pairs(cases: list[Case]) -> set[tuple[str, str, str, str]]:
    """The pairs (factor, value, other factor, other value) that no case has."""
    rows = [values_of(case) for case in cases]
    return {
        (one, value, other, second)
        for one, other in itertools.combinations(VALUES, 2)
        for value, second in itertools.product(VALUES[one], VALUES[other])
        if not {(value, second), (second, value)} & NOT_TOGETHER
        and not any(value in row[one] and second in row[other] for row in rows)
    }


def test_the_rows_have_each_value_with_each_value_of_every_other_factor() -> None:
    kinds = [*test_context_kinds.ROWS, *test_context_kinds.SLOW]
    packed = [*test_context_kinds.PACKED_ROWS, *test_context_kinds.PACKED_SLOW]
    assert missing_pairs([*test_context.CASES, *test_context.SLOW, *kinds, *packed, *MORE]) == set()


@pytest.mark.parametrize(("world_size", "cases"), batches(MORE, slow=MORE, by_layout=True))
def test_every_kind_with_every_cut_trains_as_one_process(
    pool: Pool, parity_table: list[str], world_size: int, cases: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, cases, timeout_s=300)
    for number, case in enumerate(cases):
        of_model = PACKED if PACKED in case.options else ""
        check_against_one_process(case, [traces[number] for traces in by_rank], parity_table, of_model=of_model)
