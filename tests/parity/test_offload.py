"""Where state lives changes no bit of a result: offloaded runs against the same runs with all state on the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from tests.dist.pool import Pool
from tests.parity.runs import Case, parts_of, trace

NUM_STEPS = 4
CPU = "--offload-optimizer cpu"
FILES = "--offload-optimizer nvme --offload-dir DIR"
ALL_CPU = "--offload-optimizer cpu --offload-params cpu"
ALL_FILES = "--offload-optimizer nvme --offload-params nvme --offload-dir DIR"
MIXED = "--offload-optimizer nvme --offload-params cpu --offload-dir DIR"
FULL = "--recompute-granularity full"
INPUTS = "--offload-activations --offload-dir DIR"
SP = "--sequence-parallel"
CUT = "--vocab-size 1029"  # a table that stage 3 cuts into blocks
BF16 = "--bf16 --grad-reduce-in-bf16"

# (model, layout, options without offloading, what is offloaded)
CASES = [
    ("gpt2", Layout(), "", (CPU, FILES)),
    ("llama", Layout(), "--optimizer sgd --sgd-momentum 0.9 --zero-stage 1", (FILES,)),
    ("gpt2", Layout(), "--optimizer lion --bf16 --zero-stage 3", (ALL_FILES,)),
    ("llama", Layout(dp=2), "--zero-stage 1", (CPU, FILES)),
    ("gpt2", Layout(dp=2), "--zero-stage 2", (CPU, FILES)),
    ("gpt2", Layout(dp=2), "--zero-stage 3", (CPU, FILES, ALL_CPU, ALL_FILES, MIXED)),
    (
        "llama",
        Layout(dp=2),
        f"--zero-stage 3 {BF16} {FULL} --recompute-method uniform",
        (f"{INPUTS} {ALL_FILES}",),
    ),
    ("gpt2", Layout(pp=2), f"{FULL} --pipeline-schedule zb-h1", (INPUTS,)),
    ("gpt2", Layout(dp=2), f"--zero-stage 3 {CUT} --exp-avg-dtype bf16", (CPU, ALL_FILES, MIXED)),
    ("gpt2", Layout(dp=2), "--zero-stage 1 --overlap-param-gather", (FILES,)),
    ("gpt2", Layout(dp=2), "--fp16 --zero-stage 2 --initial-loss-scale 4194304", (FILES,)),
    ("gpt2", Layout(tp=2, dp=2), f"{SP} --zero-stage 1", (CPU, FILES)),
    ("gpt2", Layout(pp=2, dp=2), f"--zero-stage 2 {BF16}", (FILES,)),
    ("gpt2", Layout(pp=2, dp=2), "--zero-stage 3", (ALL_CPU, ALL_FILES)),
    ("llama", Layout(dp=4, zero_shard=2), "--zero-stage 3 --zero-shard-size 2", (ALL_FILES,)),
    ("llama", Layout(tp=2, pp=2), SP, (FILES,)),
    ("llama", Layout(tp=2, pp=2), f"{SP} {FULL} --num-layers-per-virtual-pipeline-stage 1", (INPUTS,)),
]
BATCHES = [
    pytest.param(size, [case for case in CASES if case[1].world_size == size], id=f"world{size}", marks=marks)
    for size, marks in ((1, []), (2, []), (4, [pytest.mark.slow]))  # four ranks combine what two have
]


def traces_with_and_without(rank: int, world_size: int, cases: list, directory: str) -> list:
    """Body of a worker: losses and norms of every case, without offloading first and then with each."""
    found = []
    for model, layout, options, offloads in cases:
        mesh = make_mesh(layout)
        for offload in ("", *offloads):
            full = f"{options} {offload}".replace("DIR", directory)
            one = trace(parts_of(Case(model, layout, full), mesh), num_steps=NUM_STEPS)
            found.append((f"{model} {layout} {full}", one.losses, one.norms))
    return found


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "cases"), BATCHES)
def test_offloaded_runs_give_the_same_losses_and_norms_to_the_last_bit(
    pool: Pool, tmp_path: Path, world_size: int, cases: list
) -> None:
    found = iter(pool.run(world_size, traces_with_and_without, cases, str(tmp_path), timeout_s=240)[0])
    for _, _, _, offloads in cases:
        name, losses, norms = next(found)
        assert len(set(losses)) == NUM_STEPS, f"{name} does not learn: {losses}"
        for _ in offloads:
            offloaded, its_losses, its_norms = next(found)
            assert its_losses == losses, f"{offloaded}: losses {its_losses} instead of {losses}"
            assert repr(its_norms) == repr(norms), f"{offloaded}: norms {its_norms} instead of {norms}"
    assert list(tmp_path.iterdir()) == [], "an offload file has a name"
