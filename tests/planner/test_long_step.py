"""A step of 262,144 tokens with a vocabulary of 50,257 in one process, in a tenth of the memory of its logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron3d.planner.ledger import ledger_of
from megatron3d.planner.stage_records import StageRecords
from megatron3d.train.plan import plan_of
from tests.planner.measured import config_of

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 1 --ffn-hidden-size 64 --vocab-size 50257 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --hidden-dropout 0 "
    "--attention-dropout 0 --micro-batch-size 1 --global-batch-size 1"
)
ROOM = (
    "--loss-chunk-size 2048 --mlp-chunks-for-training 16 --recompute-granularity full --offload-activations "
    "--offload-dir"
)
ONE_STEP = """
import json, sys, time
import torch
from megatron3d.comm.device import peak_memory_bytes
from megatron3d.train.step import Rates, train_step
from tests.planner.measured import batches_of, config_of, parts_of

config = config_of(sys.argv[1], 1)
parts = parts_of(config)
start = time.perf_counter()
result = train_step(parts, *batches_of(config, parts, 1), Rates(lr=1e-3, weight_decay=0.1), step=0)
elapsed_s = time.perf_counter() - start
peak_bytes = peak_memory_bytes(torch.device("cpu"))
print(json.dumps({"loss": result.loss, "norm": result.grad_norm, "peak_bytes": peak_bytes, "elapsed_s": elapsed_s}))
"""


def length(num_tokens: int) -> str:
    return f"{SHAPE} --seq-length {num_tokens} --max-position-embeddings {num_tokens}"


def one_step(flags: str) -> dict[str, float]:
    """Loss, gradient norm, peak memory of the process and seconds of a step in a process of its own."""
    argv = [sys.executable, "-c", ONE_STEP, flags]
    made = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(made.stdout.splitlines()[-1])


def peak_of(num_tokens: int, vocabulary: int, options: str) -> int:
    config = config_of(f"{length(num_tokens)} --vocab-size {vocabulary} {options}", 1)
    return ledger_of(StageRecords(config, "cpu"), plan_of(config))[0].peak


def test_in_chunks_the_peak_does_not_grow_with_the_product_of_length_and_vocabulary() -> None:
    """What twice the length adds is the same with a vocabulary of 1,024 and of 32,768."""

    def growth(vocabulary: int, options: str) -> int:
        return peak_of(16_384, vocabulary, options) - peak_of(8192, vocabulary, options)

    chunks = "--recompute-granularity full --loss-chunk-size 256"
    assert growth(32_768, chunks) <= growth(1024, chunks)
    assert growth(32_768, "") > growth(1024, "") + 8192 * 31_000 * 4


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five minutes of one core alone, far more beside others
def test_a_step_of_262144_tokens_takes_at_most_4_gb_where_the_plain_path_needs_52(tmp_path: Path) -> None:
    config = config_of(length(262_144), 1)
    assert ledger_of(StageRecords(config, "cpu"), plan_of(config))[0].peak > 52e9
    found = one_step(f"{length(262_144)} {ROOM} {tmp_path}")
    print(found)
    assert found["peak_bytes"] <= 4e9
    # Of one part in 50257 at random weights; a shorter sequence is compared with the plain path.
    plain, roomy = one_step(length(4096)), one_step(f"{length(4096)} {ROOM} {tmp_path}")
    assert roomy["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert roomy["norm"] == pytest.approx(plain["norm"], rel=1e-5)
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.01)
