"""Random-LTD: at every layout, order and recomputation the losses, norms and gradients of one process, and at full
length those of a run without it, bit for bit.

Layers see 16 to 64 positions of 64, all from step 8 on; dropout takes part, so its masks must not depend on the layout
either.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
import torch

from megatron3d.comm.launch import Launch
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.loader import GlobalBatches
from megatron3d.errors import ConfigError, StopRequested
from megatron3d.models.flops import pretraining_flops
from megatron3d.train.evaluate import evaluate
from megatron3d.train.launch import RunContext
from megatron3d.train.loop import open_streams, train
from tests.dist.pool import Pool
from tests.parity.compare import LOSS_TOLERANCE, check_against_one_process, reference, relative
from tests.parity.runs import Case, Trace, brief, data_of, parts_of, trace, trace_cases
from tests.runs.harness import steps

SP, ZERO3, FULL = "--sequence-parallel", "--zero-stage 3", "--recompute-granularity full"
LENGTH = "--seq-length 64"
LTD = f"{LENGTH} --random-ltd --random-ltd-min 16 --random-ltd-steps 8"
OWN = f"{LENGTH} --random-ltd --random-ltd-router tests.parity.position_routers:keep_half"
# Lengths that 16 does not divide, so that strata differ in size.
SHORT = (
    f"{LTD} --seq-length-curriculum truncate --seq-length-curriculum-min-difficulty 36 "
    "--seq-length-curriculum-steps 16 --seq-length-curriculum-difficulty-step 4"
)
DOCUMENTS = "--reset-attention-mask --reset-position-ids"

IN_DOCUMENTS = f"{LTD} {DOCUMENTS}"

# Of one model, so that they share the run of one process.
CASES = [
    (brief(Case("llama-drops", Layout(tp=2), f"{SP} {FULL}")), IN_DOCUMENTS),
    (brief(Case("llama-drops", Layout(pp=2), "--pipeline-schedule zb-v")), IN_DOCUMENTS),
]
MORE = [
    (Case("gpt2-drops", Layout(tp=2)), LTD),
    (Case("gpt2-drops", Layout(pp=2)), LTD),
    (Case("gpt2-drops", Layout(pp=2), f"--pipeline-schedule zb-v {FULL}"), LTD),
    (Case("gpt2-drops", Layout(tp=2), f"{SP} {FULL} --recompute-reuse-communication"), LTD),
    (Case("gpt2", Layout(pp=2), "--pipeline-schedule zb-h1 --micro-batch-size 1"), LTD),
    (Case("llama-drops", Layout(tp=2), SP), SHORT),
    (Case("llama", Layout(tp=2), f"{SP} --recompute-granularity selective"), OWN),
    (Case("gpt2", Layout(dp=2), f"{ZERO3} {FULL}"), LTD),
    (Case("bert", Layout(tp=2), SP), LTD),
    (Case("bert-drops", Layout(pp=2), "--pipeline-schedule zb-v"), LTD),
    (Case("experts", Layout(dp=2, ep=2)), LTD),
    (Case("gpt2-drops", Layout(tp=2, pp=2), f"{SP} --pipeline-schedule zb-v {FULL}"), LTD),
    (
        Case(
            "llama-drops",
            Layout(pp=2, dp=2),
            "--num-layers-per-virtual-pipeline-stage 1",
        ),
        LTD,
    ),
    (Case("gpt2", Layout(tp=4), SP), LTD),
]


@pytest.mark.parity
def test_layouts_give_the_losses_norms_and_gradients_of_one_process(pool: Pool, parity_table: list[str]) -> None:
    check(pool, 2, CASES, parity_table)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    ("world_size", "cases"), [(size, [*group]) for size, group in groupby(MORE, lambda one: one[0].layout.world_size)]
)
def test_more_layouts_give_the_same(
    pool: Pool, parity_table: list[str], world_size: int, cases: list[tuple[Case, str]]
) -> None:
    check(pool, world_size, cases, parity_table)


def check(pool: Pool, world_size: int, cases: list[tuple[Case, str]], table: list[str]) -> None:
    given = [Case(case.model, case.layout, f"{of_model} {case.options}", case.num_steps) for case, of_model in cases]
    by_rank = pool.run(world_size, trace_cases, given, timeout_s=240)
    for number, (case, of_model) in enumerate(cases):
        traces = [traces_of_rank[number] for traces_of_rank in by_rank]
        check_against_one_process(case, traces, table, of_model=of_model)


def traced(options: str, *, num_steps: int = 3, model: str = "llama-drops") -> Trace:
    return trace(parts_of(Case(model, Layout(), options), make_mesh(Layout())), num_steps=num_steps)


def same_bits(one: Trace, other: Trace) -> bool:
    return (one.losses, one.norms) == (other.losses, other.norms) and all(
        torch.equal(values, of_other[1])
        for name, pieces in one.gradients.items()
        for (_, values), of_other in zip(pieces, other.gradients[name], strict=True)
    )


def test_at_full_length_a_run_is_that_without_bit_for_bit() -> None:
    """By the schedule, which then asks nobody, and by a router that keeps all, whose rows go the way of kept ones."""
    common = f"{LENGTH} {DOCUMENTS} --micro-batch-size 4"
    plain = traced(common)
    assert same_bits(traced(f"{common} --random-ltd --random-ltd-min 64"), plain)
    own = "--random-ltd --random-ltd-router tests.parity.position_routers:keep_all"
    assert same_bits(traced(f"{common} {own}"), plain)
    assert not same_bits(traced(f"{common} --random-ltd --random-ltd-min 48 --random-ltd-max 48"), plain)


def test_the_rows_really_drop_and_an_evaluation_does_not() -> None:
    plain = traced(f"{LENGTH} {DOCUMENTS}").losses
    assert relative(reference("llama-drops", IN_DOCUMENTS)[0].losses[:3], plain) > 100 * LOSS_TOLERANCE
    found = []
    for options in (LTD, LENGTH):
        parts = parts_of(Case("gpt2", Layout(), options), make_mesh(Layout()))
        data = data_of(parts.config)
        with GlobalBatches(data.reader(data.valid), num_workers=0) as batches:
            found.append(evaluate(parts, batches, num_batches=1).loss)
    assert found[0] == found[1]


def test_a_run_reports_what_its_layers_saw_and_resumes_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"

    def run(options: str) -> float:
        case = Case("gpt2", Layout(), f"{LTD} --train-iters 4 --eval-iters 0 --log-interval 1 {options}")
        parts = parts_of(case, make_mesh(Layout()))
        with open_streams(data_of(parts.config), parts.config.data) as streams:
            train(parts, streams, RunContext(Launch()))
        return pretraining_flops(parts.config.model).of([64])

    flops = run(f"--metrics-file {whole}")
    with pytest.raises(StopRequested):
        run(f"--metrics-file {again} --save {tmp_path}/save --exit-interval 2")
    run(f"--metrics-file {again} --save {tmp_path}/save")
    made = steps(whole)
    for name in ("loss", "grad_norm", "layer_tokens"):
        assert [record[name] for record in steps(again)] == [record[name] for record in made]
    # 8 samples; two of four layers see 16 positions, and 32 at step 3 of 8.
    assert [record["layer_tokens"] for record in made] == [8 * (2 * 64 + 2 * kept) for kept in (16, 16, 16, 32)]
    # A layer of H = 32 takes 72 H^2 operations a token, and 12 H more for each token that one attends to.
    saved = [2 * (72 * 32**2 * (64 - kept) + 12 * 32 * (64**2 - kept**2)) for kept in (16, 16, 16, 32)]
    found = [record["tflops_per_device"] * record["step_time_s"] * 1e12 for record in made]
    assert found == pytest.approx([8 * (flops - one) for one in saved], rel=1e-9)
    assert "1.28K layer tokens (62.5 %)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [3, 2]", "positions from 2 to 3, and they must ascend, each once, within 0 to 63"),
        ("return [0, 64]", "positions from 0 to 64"),
        ("return []", "give a list of at least one whole number"),
        ("return [0.5]", "give a list of at least one whole number"),
        ("return range(1 + sample)", "sample 1 keeps 2 positions, and 1 of sample 0"),
        ("return 1 / 0", "failed (ZeroDivisionError: division by zero); mend the function"),
    ],
)
def test_a_router_of_ones_own_that_errs_is_named(tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def choose(step, layer, sample):\n    {body}\n")
    with pytest.raises(ConfigError) as caught:
        traced(f"{LENGTH} --random-ltd --random-ltd-router {file}:choose", num_steps=1, model="gpt2")
    assert message in str(caught.value) and f"{file}:choose at step 0, layer 1" in str(caught.value)


def _uneven(rank: int, world_size: int, options: str) -> str:
    parts = parts_of(Case("gpt2", Layout(tp=2), options), make_mesh(Layout(tp=2)))
    with pytest.raises(ConfigError) as caught:
        trace(parts, num_steps=1)
    return str(caught.value)


def test_shards_of_which_a_router_keeps_different_numbers_are_named(pool: Pool, tmp_path: Path) -> None:
    file = tmp_path / "uneven.py"
    file.write_text("def choose(step, layer, sample):\n    return [0, 1, 40]\n")
    for message in pool.run(2, _uneven, f"{LENGTH} {SP} --random-ltd --random-ltd-router {file}:choose"):
        assert "keeps 2, 1 positions of the 2 shards of --sequence-parallel" in message
