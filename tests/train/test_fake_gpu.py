"""A training step on a GPU that is not there: no operation mixes devices, and no micro-batch waits for the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LLAMA = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --qk-layernorm --group-query-attention "
    "--num-query-groups 2 --disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0"
)
FULL = "--recompute-granularity full --recompute-method uniform"
MODELS = {"gpt": ("gpt", ""), "llama": ("gpt", LLAMA), "bert": ("bert", "")}
PADDED = (
    "--num-experts 4 --moe-router-topk 2 --moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity "
    "--zero-stage 1 --overlap-param-gather"
)
FEW = (
    ("gpt", "triton", f"{PADDED} --bf16"),
    ("gpt", "triton", "--optimizer lamb --zero-stage 1"),
    ("gpt", "reference", f"{FULL} --optimizer muon --bf16 --zero-stage 3"),
    ("gpt", "triton", f"{LLAMA} --fp16 --zero-stage 1"),
    ("bert", "triton", "--bf16 --zero-stage 2"),
    ("gpt", "triton", "--bf16 --fp8-format hybrid"),
    ("gpt", "triton", "--bf16 --fp8-format e4m3 --fp8-recipe blockwise --hidden-size 128 --zero-stage 3"),
)
ALL = tuple(
    (architecture, kernels, f"{flags} {precision} --zero-stage {stage}")
    for (architecture, flags), kernels, precision, stage in product(
        MODELS.values(), ("triton", "reference"), ("", "--bf16", "--fp16"), range(4)
    )
) + tuple(
    ("gpt", "triton", f"--bf16 {more}")
    for more in (
        "--zero-stage 1 --offload-optimizer cpu",
        "--zero-stage 3 --offload-optimizer cpu --offload-params cpu",
        "--zero-stage 2 --optimizer adafactor --grad-reduce-in-bf16",
        f"--zero-stage 3 {FULL}",
    )
)


def check(cases: tuple[tuple[str, str, str], ...]) -> None:
    """Run the cases, which fail where devices mix, and look at what went between device and host."""
    command = [sys.executable, "-m", "tests.train.fake_gpu", json.dumps(cases)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=570, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for case, outcome in zip(cases, json.loads(ended.stdout.splitlines()[-1]), strict=True):
        # Weights that lie on the host are copied to the device before they are used; no copy goes the other way.
        fetches = {"aten.copy_.default to the device"} if "--offload-params" in case[2] else set()
        assert set(outcome["inside"]) == fetches, case
        assert outcome["outside"], case  # at least the samples go to the device
        if not any(word in case[2] for word in ("--offload", "adafactor")):
            # For one list: votes to stop, squared norm of the gradients, losses. Nothing after it, and no copy.
            assert outcome["reads"] == outcome["waits"] == ["tolist"], case
        assert outcome["weights_on"] == ["fakegpu"], case


@pytest.mark.heavy
def test_a_step_on_a_fake_gpu_mixes_no_devices_and_reads_nothing_within_a_micro_batch() -> None:
    check(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_so_do_all_models_precisions_stages_and_kernels(model: str) -> None:
    architecture, flags = MODELS[model]
    check(tuple(case for case in ALL if case[0] == architecture and (LLAMA in case[2]) == (flags == LLAMA)))
