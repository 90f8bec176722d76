"""A sequence-length curriculum gives at every layout the training of one process, whose batches a test could have cut.

Lengths change in the first steps; dropout draws its masks by the rows of samples, whatever micro-batch holds them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.batch import GPTBatch
from megatron3d.data.loader import GlobalBatches
from megatron3d.train.step import train_step
from tests.dist.pool import Pool
from tests.parity.compare import AT_ONCE, check_against_one_process
from tests.parity.runs import RATES, Case, batches, brief, data_of, parts_of, trace, trace_cases

SP = "--sequence-parallel"
# 4 tokens in the first step, 8 from the second on, 12 from the fourth and all 16 from the sixth.
PACE = (
    "--seq-length-curriculum-min-difficulty 4 --seq-length-curriculum-steps 6 --seq-length-curriculum-difficulty-step 4"
)
TRUNCATE, RESHAPE = (f"--seq-length-curriculum {way} {PACE}" for way in ("truncate", "reshape"))
# 12 tokens in the first step, of which all are seen, and from then on 24 to 48, of which the middle layers see 16.
DROPPING = (
    "--seq-length 48 --random-ltd --random-ltd-min 16 --random-ltd-max 16 --seq-length-curriculum truncate "
    "--seq-length-curriculum-min-difficulty 12 --seq-length-curriculum-steps 4 "
    "--seq-length-curriculum-difficulty-step 12"
)
LENGTHS = [4, 8, 8, 12, 12, 16]


def cases() -> list[tuple[Case, str]]:
    """Each case with the options that belong to its model."""
    return [
        (Case("gpt2", Layout(pp=2), TRUNCATE), TRUNCATE),
        (Case("llama", Layout(tp=2), f"{SP} {RESHAPE}"), RESHAPE),
        (Case("gpt2-drops", Layout(pp=2), f"--pipeline-schedule zb-v {RESHAPE}"), RESHAPE),
    ]


def more_cases() -> list[tuple[Case, str]]:
    """What the others have one by one, together."""
    full = "--recompute-granularity full"
    virtual = "--pipeline-schedule interleaved --num-virtual-stages-per-pipeline-rank 2"
    return [
        (Case("llama-drops", Layout(tp=2, pp=2), f"{SP} {full} {TRUNCATE}"), TRUNCATE),
        (Case("gpt2", Layout(pp=2, dp=2), f"{virtual} --zero-stage 2 {RESHAPE}"), RESHAPE),
        (Case("llama", Layout(pp=2, dp=2), f"--pipeline-schedule zb-h1 --zero-stage 3 {TRUNCATE}"), TRUNCATE),
        (Case("experts", Layout(dp=2, ep=2), RESHAPE), RESHAPE),
        (Case("gpt2", Layout(tp=2), f"{SP} {DROPPING}"), DROPPING),
    ]


@pytest.mark.parity
@pytest.mark.parametrize(
    "found", [cases(), pytest.param(more_cases(), marks=pytest.mark.slow)], ids=["two ranks", "more ranks"]
)
def test_a_layout_gives_the_losses_norms_and_gradients_of_one_process(
    pool: Pool, parity_table: list[str], found: list[tuple[Case, str]]
) -> None:
    of_model = {brief(case): options for case, options in found}
    for param in batches(of_model):
        world_size, batch = param.values
        by_rank = pool.run(world_size, trace_cases, batch, timeout_s=240)
        for number, case in enumerate(batch):
            traces = [traces_of_rank[number] for traces_of_rank in by_rank]
            check_against_one_process(case, traces, parity_table, of_model=of_model[case])


@pytest.mark.parametrize("options", [TRUNCATE, RESHAPE])
def test_one_process_trains_on_the_batches_that_are_cut_by_hand(options: str) -> None:
    """The same weights without a curriculum, given short samples: bit for bit the same losses and norms."""
    found = trace(parts_of(Case("gpt2", Layout(), f"{AT_ONCE} {options}"), make_mesh(Layout())), num_steps=6)
    parts = parts_of(Case("gpt2", Layout(), AT_ONCE), make_mesh(Layout()))
    data = data_of(parts.config)
    with GlobalBatches(data.reader(data.train), num_workers=0) as read:
        for step, length in enumerate(LENGTHS):
            batch = cut(read.read(step * 8, 8, 0, 1), length, splits=options == RESHAPE)
            micro = batch.tokens_BS.shape[0]  # the whole batch at once
            sized = replace(parts.config, train=replace(parts.config.train, micro_batch_size=micro))
            result = train_step(replace(parts, config=sized), batch, RATES, step=step)
            assert (result.loss, result.grad_norm) == (found.losses[step], found.norms[step]), step


def cut(batch: GPTBatch, length: int, *, splits: bool) -> GPTBatch:
    """The first tokens of each sample, or its rows one after another."""
    starts = range(0, 16 - length + 1, length) if splits else (0,)
    fields = (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS)
    rows = [[values[start : start + length] for values in field for start in starts] for field in fields]
    return GPTBatch(*(torch.stack(field) for field in rows))
