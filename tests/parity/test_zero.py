"""Sharded gradients and weights change no result: stages 2 and 3 of ZeRO against one process, at every kind of layout.

With them go what could upset them: several stages on a rank, recomputation inside which weights are gathered again,
hierarchical groups, 16-bit precisions, skipped steps. Orders that split the backward or put both ends of a tied model
on one rank are in test_schedules.py, with both stages.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.build import build_gpt_data
from megatron3d.data.loader import GlobalBatches
from megatron3d.optim.schedule import settings_from_config
from megatron3d.params.boxes import Box
from megatron3d.train import state
from megatron3d.train.evaluate import evaluate
from megatron3d.train.setup import TrainingSetup
from megatron3d.train.state import Progress
from tests.dist.pool import Pool
from tests.parity.compare import check_against_one_process, reference, relative
from tests.parity.runs import BRIEF_STEPS, Case, Trace, assemble, batches, brief, parts_of, trace, trace_cases

SP = "--sequence-parallel"
ZERO2, ZERO3 = "--zero-stage 2", "--zero-stage 3"
PAIRS = "--zero-shard-size 2"
GROUPS_OF_TWO_LAYERS = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2"

KINDS = [
    Case("gpt2", Layout(dp=2), f"{ZERO3} --recompute-granularity selective"),
    Case("llama-tied", Layout(dp=4, zero_shard=2), f"{ZERO3} {PAIRS} {GROUPS_OF_TWO_LAYERS}"),
    Case("gpt2", Layout(pp=2, dp=2), ZERO2),
]
OTHERS = [
    Case("gpt2", Layout(tp=2, dp=2), f"{SP} {ZERO3} {GROUPS_OF_TWO_LAYERS} --zero-prefetch-units 2"),
    Case("gpt2", Layout(dp=4), f"{ZERO2} --no-overlap-grad-reduce"),
    Case(
        "llama",
        Layout(pp=2, dp=2),
        f"{ZERO3} --recompute-granularity full --recompute-method block --recompute-num-layers 1",
    ),
    Case("llama-tied", Layout(pp=2), ZERO3),  # one data-parallel rank: weights come and go on the rank itself
    Case("gpt2", Layout(dp=4), f"{ZERO3} --zero-prefetch-units 0 --micro-batch-size 1"),
    Case("llama", Layout(dp=4, zero_shard=2), f"--zero-stage 1 {PAIRS} --overlap-param-gather"),
    Case("gpt2", Layout(dp=4, zero_shard=2), f"{ZERO2} {PAIRS} --overlap-param-gather"),
    Case("llama", Layout(tp=2, dp=2), ZERO2),
    Case(
        "gpt2",
        Layout(pp=2, dp=2),
        f"{ZERO3} --pipeline-schedule interleaved --num-virtual-stages-per-pipeline-rank 2",
    ),
    Case("gpt2", Layout(tp=2, pp=2, dp=2), f"{SP} {ZERO2}"),
    Case("gpt2", Layout(tp=2, pp=2, dp=2), f"{SP} {ZERO3}"),
    Case("llama", Layout(pp=2, dp=4, zero_shard=2), f"{ZERO3} {PAIRS}"),
    Case("llama", Layout(dp=8), ZERO3),
]
CASES = [*KINDS, *map(brief, OTHERS)]
SHORT = [
    Case("gpt2", Layout(dp=2), f"{ZERO3} --recompute-granularity selective"),
    Case("gpt2", Layout(pp=2, dp=2), ZERO2),
]
# On eight ranks all axes at once; the rest are wider versions of rows of four.
SLOW = [case for case in CASES if case.layout.world_size == 8 and case.options != f"{SP} {ZERO3}"]
BATCHES = batches(CASES, short=SHORT, slow=SLOW)


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), BATCHES)
def test_sharded_gradients_and_weights_give_the_training_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=300)
    for number, case in enumerate(batch):
        check_against_one_process(case, [traces_of_rank[number] for traces_of_rank in by_rank], parity_table)


# Tables so large that stage 3 cuts them into blocks of rows; with the longer sequences every rank looks up more rows
# than it owns, so that gradients of lookups go by blocks too.
CUT, CUT_LONG = "--vocab-size 1029", "--vocab-size 1029 --seq-length 136"
# The positions of the first stage are larger than the table, so that of its two holders only the last stage cuts it.
CUT_AT_ONE_END = "--vocab-size 1029 --hidden-size 48 --make-vocab-size-divisible-by 1 --max-position-embeddings 2048"
TABLES = ("embedding.word", "head.output")
ALL_FILES = "--offload-optimizer nvme --offload-params nvme --offload-dir DIR"
CUT_CASES = [
    (Case("gpt2", Layout(dp=2), ZERO3), CUT),
    (Case("bert-untied", Layout(dp=2), ZERO3, BRIEF_STEPS), CUT),
    (Case("gpt2-begun", Layout(dp=2), ZERO3, BRIEF_STEPS), CUT),  # a frozen table has no gradient
    (Case("gpt2", Layout(pp=2), f"{ZERO3} --pipeline-schedule zb-h1", BRIEF_STEPS), CUT),
    (Case("gpt2", Layout(tp=2, dp=2), f"{SP} {ZERO3} {GROUPS_OF_TWO_LAYERS}", BRIEF_STEPS), CUT),
    (Case("gpt2", Layout(dp=4, zero_shard=2), f"{ZERO3} {PAIRS}", BRIEF_STEPS), CUT),
    (Case("gpt2", Layout(dp=4), ZERO3, BRIEF_STEPS), CUT_LONG),
    (Case("gpt2", Layout(pp=2, dp=2), ZERO3, BRIEF_STEPS), CUT_AT_ONE_END),
]
MORE_CUT_CASES = [
    (Case("gpt2", Layout(dp=2), f"{ZERO3} {ALL_FILES}", BRIEF_STEPS), CUT),
    (Case("llama", Layout(pp=2, dp=2), f"{ZERO3} --zero-prefetch-units 0", BRIEF_STEPS), CUT),
    (Case("gpt2", Layout(pp=2, dp=2), f"{ZERO3} --pipeline-schedule zb-v", BRIEF_STEPS), CUT),
    (Case("bert-untied", Layout(tp=2, dp=2), f"{SP} {ZERO3}", BRIEF_STEPS), CUT),
    (Case("gpt2", Layout(dp=8), ZERO3, BRIEF_STEPS), CUT_LONG),
    (Case("gpt2", Layout(tp=2, pp=2, dp=2), f"{SP} {ZERO3}", BRIEF_STEPS), CUT),
]


def trace_cut(rank: int, world_size: int, cases: list[Case], directory: str) -> list[Trace]:
    """Body of a worker: traces of cases whose tables are cut, on every rank that has one."""
    found = []
    for case in cases:
        parts = parts_of(replace(case, options=case.options.replace("DIR", directory)), make_mesh(case.layout))
        tables = [unit for name, unit in parts.engine.units.items() if name.startswith(TABLES)]
        is_cut = CUT_AT_ONE_END not in case.options or "embedding" not in parts.engine.units
        assert all(bool(unit.blocks) == is_cut for unit in tables), f"{case}: a table is {'whole' if is_cut else 'cut'}"
        found.append(trace(parts, num_steps=case.num_steps))
    return found


def check_cut(
    pool: Pool, table: list[str], directory: Path, world_size: int, cut_cases: list[tuple[Case, str]]
) -> None:
    """Compare those of one world size with one process."""
    cases = [
        (replace(case, options=f"{case.options} {cut}"), cut)
        for case, cut in cut_cases
        if case.layout.world_size == world_size
    ]
    by_rank = pool.run(world_size, trace_cut, [case for case, _ in cases], str(directory), timeout_s=300)
    for number, (case, cut) in enumerate(cases):
        check_against_one_process(case, [traces[number] for traces in by_rank], table, of_model=cut)


@pytest.mark.parity
@pytest.mark.parametrize("world_size", [2, 4])
def test_tables_cut_into_blocks_give_the_training_of_one_process(
    pool: Pool, parity_table: list[str], tmp_path: Path, world_size: int
) -> None:
    check_cut(pool, parity_table, tmp_path, world_size, CUT_CASES)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_more_tables_cut_into_blocks_give_the_training_of_one_process(
    pool: Pool, parity_table: list[str], tmp_path: Path, world_size: int
) -> None:
    check_cut(pool, parity_table, tmp_path, world_size, MORE_CUT_CASES)


def sixteen_bit(rank: int, world_size: int, options: str) -> list[tuple[list[float], list[float]]]:
    """Losses and norms of a few steps in 16 bits at every stage."""
    mesh = make_mesh(Layout(dp=2))
    traces = [
        trace(parts_of(Case("gpt2", mesh.layout, f"{options} --zero-stage {stage}"), mesh), num_steps=6)
        for stage in range(4)
    ]
    return [(one.losses, one.norms) for one in traces]


@pytest.mark.parametrize("options", ["--bf16", "--bf16 --grad-reduce-in-bf16", "--fp16 --initial-loss-scale 4194304"])
def test_every_stage_trains_in_16_bits_alike(pool: Pool, options: str) -> None:
    """bf16 keeps 8 bits, so sums in another order change a loss by 2^-9 at most; fp16 begins with steps it skips."""
    (plain, plain_norms), *sharded = pool.run(2, sixteen_bit, options)[0]
    assert plain[-1] < plain[0]
    for losses, norms in sharded:
        assert relative(losses, plain) < 2**-9
        finite = [n == n and n != float("inf") for n in plain_norms]
        assert [n == n and n != float("inf") for n in norms] == finite, "the same steps are skipped"
        assert all(finite) or "--fp16" in options


def losses_around_an_evaluation(rank: int, world_size: int, options: str) -> list[float]:
    """The loss of an evaluation of the initial weights, and of another: weights that come and go come again."""
    case = Case("gpt2", Layout(pp=2, dp=2), options)
    parts = parts_of(case, make_mesh(case.layout))
    data = build_gpt_data(parts.config.data, seq_length=16, vocab_size=101, eod_token=0)
    held = [parts.engine.transient.held_bytes]
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        losses = [evaluate(parts, batches, num_batches=2).loss for _ in range(2)]
    held.append(parts.engine.transient.held_bytes)
    assert held == [0, 0], f"{held} bytes are held before and after"
    return losses


def test_an_evaluation_gathers_and_frees_the_weights(pool: Pool) -> None:
    sharded = pool.run(4, losses_around_an_evaluation, ZERO3)
    assert sharded == pool.run(4, losses_around_an_evaluation, "")
    assert sharded[0][0] == sharded[0][1]


MOVES = [
    (Layout(dp=2), "--bf16 --zero-stage 2"),
    (Layout(dp=2), "--bf16 --zero-stage 3"),
    (Layout(dp=4, zero_shard=2), f"--bf16 {ZERO3} {PAIRS}"),
    (Layout(pp=2, dp=2), "--bf16 --zero-stage 3"),
    (Layout(tp=2, dp=2), f"--bf16 {SP} {ZERO2}"),
]


def move_on(rank: int, world_size: int, directory: str) -> list[dict[str, list[tuple[Box, Tensor]]]]:
    """Train and save at stage 0; load at each stage, compare, and save there for the next."""
    first = Case("gpt2-words", Layout(dp=world_size), f"--bf16 --save {directory}/0")
    parts = parts_of(first, make_mesh(first.layout))
    trace(parts, num_steps=2)
    schedule = settings_from_config(parts.config.optim, parts.config.train)
    state.save(parts, Progress(step=2), schedule)
    found = [held(parts)]
    for number, (layout, options) in enumerate([move for move in MOVES if move[0].world_size == world_size], 1):
        moved = Case("gpt2-words", layout, f"{options} --load {directory}/{number - 1} --save {directory}/{number}")
        parts = parts_of(moved, make_mesh(layout))
        is_cut = any(unit.blocks for unit in parts.engine.units.values())
        assert is_cut == parts.engine.options.policy.shard_params
        state.restore(parts)
        state.save(parts, Progress(step=2 + number), schedule)
        found.append(held(parts))
    return found


def held(parts: TrainingSetup) -> dict[str, list[tuple[Box, Tensor]]]:
    """Master weights and both moments that this rank owns."""
    engine, optimizer = parts.engine, parts.optimizer
    views = {f"weights/{name}": view for name, view in engine.weight_views().items()}
    for kind in ("exp_avg", "exp_avg_sq"):
        views |= {f"{kind}/{name}": view for name, view in engine.state_views(optimizer, kind).items()}
    return {name: [(box, tensor.clone()) for box, tensor in view.box_tensors()] for name, view in views.items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_checkpoints_move_between_stages_bit_for_bit(pool: Pool, tmp_path: Path, world_size: int) -> None:
    by_rank = pool.run(world_size, move_on, str(tmp_path))
    weights = reference("gpt2-words")[1]
    shapes = {
        f"{kind}/{name}": shape for kind in ("weights", "exp_avg", "exp_avg_sq") for name, shape in weights.items()
    }
    first, *others = (
        assemble([Trace([], [], rank[number]) for rank in by_rank], shapes) for number in range(len(by_rank[0]))
    )
    assert others and not any(tensor.isnan().any() for tensor in first.values())
    assert any(bool(tensor.count_nonzero()) for name, tensor in first.items() if name.startswith("exp_avg"))
    for moved in others:
        assert all(torch.equal(moved[name], first[name]) for name in shapes)
