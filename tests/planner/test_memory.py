"""The state of training: bytes by formula equal to bytes allocated, at every stage, layout, precision and place."""

from __future__ import annotations

from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.config.run import RunConfig
from megatron3d.models.counts import num_parameters
from megatron3d.planner.ledger import ledger_of
from megatron3d.planner.memory import StateForecast, parts_of_rank, shard_size, state_bytes
from megatron3d.planner.stage_records import StageRecords
from megatron3d.train.plan import plan_of
from tests.dist.pool import Pool
from tests.planner.measured import Held, config_of, hold_all

# Odd sizes, so that units end in padding; 3 layers in 2 stages, so that stages differ.
TINY = (
    "--num-layers 3 --hidden-size 20 --num-attention-heads 2 --vocab-size 61 --make-vocab-size-divisible-by 5 "
    "--seq-length 8 --max-position-embeddings 8 --micro-batch-size 1 --global-batch-size 8"
)
UNTIED = "--untie-embeddings-and-output-weights"
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
PRECISIONS = ("", "--bf16", "--bf16 --grad-reduce-in-bf16")
LAYOUTS_OF_4 = ("", "--zero-shard-size 2", f"{TP} 2", f"{TP} 2 --sequence-parallel {UNTIED}", f"{PP} 2")
CUT = "--vocab-size 2003"  # tables that stage 3 cuts into blocks
MORE_OF_4 = (
    f"--zero-stage 3 --bf16 --grad-reduce-in-bf16 {PP} 2 {CUT}",
    f"--zero-stage 3 --optimizer adafactor {TP} 2 {UNTIED} {CUT}",
    f"{TP} 2 {PP} 2",
    f"{PP} 2 {UNTIED} --zero-stage 2",
    f"{PP} 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 --zero-stage 3 --bf16",
    f"{PP} 2 --num-layers 4 --pipeline-schedule zb-v --zero-stage 1",
    f"{PP} 2 --num-layers 4 --pipeline-schedule dualpipe-v --zero-stage 2 --bf16",
    "--zero-stage 1 --optimizer sgd --sgd-momentum 0",
    "--zero-stage 2 --optimizer sgd --sgd-momentum 0.9",
    "--zero-stage 1 --optimizer lion --bf16",
    "--zero-stage 3 --optimizer lamb",
    "--zero-stage 2 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --bf16",
    "--zero-stage 1 --optimizer adafactor",
    f"--zero-stage 0 --optimizer adafactor {TP} 2",
    "--zero-stage 1 --optimizer muon",
    f"--zero-stage 3 --optimizer muon {PP} 2 --bf16",
    "--zero-stage 2 --swiglu --ffn-hidden-size 24 --normalization RMSNorm --disable-bias-linear",
    "--zero-stage 1 --position-embedding-type rope --fp16",
    "--zero-stage 1 --group-query-attention --num-query-groups 1 --qk-layernorm",
    f"{PP} 2 --zero-stage 1 --bf16 --freeze-params embedding.* layers.0.* layers.1.*",
    "--zero-stage 3 --bf16 --freeze-params *.attention.* embedding.*",
    f"--zero-stage 2 --optimizer muon {TP} 2 --freeze-params *.mlp.*",
)
OFFLOADED = (
    "--zero-stage 0 --offload-optimizer PLACE",
    "--zero-stage 1 --offload-optimizer PLACE --bf16",
    "--zero-stage 1 --offload-optimizer PLACE --bf16 --offload-delayed-update",
    f"--zero-stage 2 --offload-optimizer PLACE --bf16 --grad-reduce-in-bf16 {TP} 2",
    f"--zero-stage 3 --offload-optimizer PLACE {PP} 2 --optimizer lion",
    "--zero-stage 3 --offload-optimizer PLACE --offload-params PLACE --bf16 --exp-avg-dtype bf16",
    "--zero-stage 3 --offload-optimizer PLACE --offload-params PLACE --bf16 --freeze-params *.attention.* embedding.*",
    "--zero-stage 1 --offload-optimizer PLACE --freeze-params layers.0.*",
    f"--zero-stage 3 --offload-optimizer PLACE --offload-params PLACE --bf16 {CUT}",
)


def predicted(config: RunConfig, found: list[Held]) -> list[StateForecast]:
    """The formula for each of the ranks that `found` was measured on."""
    plan = plan_of(config)
    units = {rank: parts_of_rank(config, plan, rank).units.values() for rank in {held.pp_rank for held in found}}
    return [
        state_bytes(config.parallel, config.optim, units[held.pp_rank], shard_rank=held.shard_rank) for held in found
    ]


def check(pool: Pool, world_size: int, cases: list[tuple[str, str]]) -> list[list[Held]]:
    """Fail with a line for each case whose formula is not what was allocated; return the latter, rank by rank, of
    each case."""
    by_case = [list(found) for found in zip(*pool.run(world_size, hold_all, cases, timeout_s=600), strict=True)]
    wrong = []
    for (kind, flags), found in zip(cases, by_case, strict=True):
        expected = predicted(config_of(flags, world_size, architecture=kind), found)
        wrong += [
            f"{kind} {flags}: predicted {state}, allocated {held}"
            for state, held in zip(expected, found, strict=True)
            if state != held.state
        ]
    assert not wrong, "\n".join(wrong)
    return by_case


def test_state_is_what_is_allocated_at_every_stage_precision_and_layout(pool: Pool, tmp_path: Path) -> None:
    cases = [("gpt", f"{TINY} --zero-stage {stage} {precision}") for stage, precision in product(range(4), PRECISIONS)]
    for number, (layout, stage) in enumerate(product(LAYOUTS_OF_4[1:], range(4))):
        if stage or "shard-size" not in layout:  # which shards nothing at stage 0
            cases += [("gpt", f"{TINY} {layout} --zero-stage {stage} {PRECISIONS[(number + stage) % 3]}")]
    cases += [("gpt", f"{TINY} {more}") for more in MORE_OF_4]
    cases += [
        ("bert", f"{TINY} {layout} --zero-stage {stage}")
        for layout, stage in zip(LAYOUTS_OF_4, (0, 1, 2, 3, 1), strict=True)
    ]
    for place, directory in (("cpu", ""), ("nvme", f"--offload-dir {tmp_path}")):
        cases += [("gpt", f"{TINY} {one.replace('PLACE', place)} {directory}") for one in OFFLOADED]
    held = [one.state for found in check(pool, 4, cases) for one in found]
    # The comparison is of something: every kind of state is there somewhere (declared state has a test of its own).
    kinds = {one.name for one in fields(StateForecast)} - {"declared"}
    assert all(any(getattr(state, kind) for state in held) for kind in kinds)


# Bytes of each parameter with Adam: those that every rank has, and those that N ranks shard.
FORMULAS = {
    ("--bf16 --grad-reduce-in-bf16", 1): (4, 16),
    ("--bf16 --grad-reduce-in-bf16", 2): (2, 18),
    ("--bf16 --grad-reduce-in-bf16", 3): (0, 20),
    ("--bf16", 1): (6, 12),
    ("--bf16", 2): (2, 16),
    ("--bf16", 3): (0, 18),
}


@pytest.mark.parametrize("world_size", [4, 8])
def test_bytes_for_each_parameter_are_those_of_the_formulas(pool: Pool, world_size: int) -> None:
    """Source: Rajbhandari et al. 2020, section 5; with gradients in bf16, docs/zero.md."""
    wider = TINY.replace("--hidden-size 20", "--hidden-size 60")
    cases = [("gpt", f"{wider} --zero-stage {stage} {precision}") for precision, stage in FORMULAS]
    config = config_of(cases[0][1], world_size)
    units = parts_of_rank(config, plan_of(config), 0).units
    count = num_parameters(config.model)
    padding = sum(layout.length for layout in units.values()) - count
    assert 0 < padding < 0.02 * count
    for (stays, shared), found in zip(FORMULAS.values(), check(pool, world_size, cases), strict=True):
        per_parameter = stays + shared / world_size
        for held in found:
            # Padding lies at the end of a unit, so it is one rank that holds it and has no moments for it.
            off = held.state.on_device - per_parameter * count
            assert -8 * padding <= off <= per_parameter * padding, f"{per_parameter} bytes: {off} off"


def test_staging_buffers_do_not_grow_with_a_vocabulary_whose_table_is_cut() -> None:
    hosts = []
    for words in (2003, 20003):
        flags = f"{TINY} --zero-stage 3 --offload-optimizer nvme --offload-params nvme --offload-dir d"
        config = config_of(f"{flags} --vocab-size {words}", 2)
        units = parts_of_rank(config, plan_of(config), 0).units
        hosts.append(state_bytes(config.parallel, config.optim, units.values()).host)
    assert hosts[1] <= 1.2 * hosts[0] > 0, hosts  # blocks are as equal as whole rows of each rank allow


@settings(deadline=None, max_examples=25)
@given(
    hidden=st.integers(1, 12).map(lambda n: 4 * n),
    layers=st.integers(1, 3),
    vocab=st.integers(2, 300),
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    precision=st.sampled_from(PRECISIONS),
)
def test_shards_together_hold_what_one_rank_would(
    hidden: int, layers: int, vocab: int, ranks: int, precision: str
) -> None:
    """Moments leave padding out, so the parts of all ranks add up to them, whatever the number of ranks."""
    flags = (
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads 2 --vocab-size {vocab} --seq-length 4 "
        f"--max-position-embeddings 4 --micro-batch-size 1 {precision}"
    )
    alone = config_of(f"{flags} --zero-stage 0", 1)
    whole = state_bytes(alone.parallel, alone.optim, parts_of_rank(alone, plan_of(alone), 0).units.values())
    shared = config_of(f"{flags} --zero-stage 3", ranks)
    units = list(parts_of_rank(shared, plan_of(shared), 0).units.values())
    assert shard_size(shared.parallel) == ranks
    held = [state_bytes(shared.parallel, shared.optim, units, shard_rank=rank) for rank in range(ranks)]
    assert sum(state.moments for state in held) == whole.moments
    padded = sum(layout.length for layout in units)
    element = 4 if precision == "" else 2
    assert sum(state.weights for state in held) == element * padded >= whole.weights
    assert sum(state.master_weights for state in held) == (4 * padded if element < 4 else 0)


def test_the_ledger_names_the_state_of_the_rank_that_holds_most() -> None:
    config = config_of(f"{TINY} {PP} 2 --zero-stage 1", 4)
    plan = plan_of(config)
    for one in ledger_of(StageRecords(config, "cpu"), plan):
        units = parts_of_rank(config, plan, one.pp_rank).units.values()
        shards = [state_bytes(config.parallel, config.optim, units, shard_rank=rank).on_device for rank in range(2)]
        assert one.state.on_device == max(shards) > min(shards)
