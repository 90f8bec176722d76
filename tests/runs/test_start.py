"""What a run imports until its last step: nothing that takes long and that it does not use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of each: what imports it where it is not asked for.
SLOW = {
    "torch._dynamo": "optimizers of torch, modes of dispatch, functions for the meta device",
    "sympy": "checks of sizes in torch's functions for the meta device",
    "torch.distributed.checkpoint": "saves",
    "tensorboard": "--tensorboard-dir",
    "matplotlib": "--profile-pipeline",
    "rich": "a terminal",
    "google.protobuf": "sentencepiece models that are taken apart",
    "onnx": "exports",
    "transformers": "nothing",
}
SIZES = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --vocab-size 96 --micro-batch-size 2"
STEPS = "--global-batch-size 4 --train-iters 2 --eval-iters 1 --mock-data --device cpu --lr 1e-3"
LLAMA = "--position-embedding-type rope --normalization RMSNorm --swiglu --num-query-groups 1 --disable-bias-linear"
RUNS = (
    f"pretrain_gpt.py {SIZES} {STEPS} --optimizer adamw",
    f"pretrain_gpt.py {SIZES} {STEPS} {LLAMA} --bf16 --zero-stage 3 --optimizer sgd",
    f"pretrain_gpt.py {SIZES} {STEPS} {LLAMA} --num-experts 4 --moe-router-topk 2 --optimizer muon --zero-stage 2",
    f"pretrain_gpt.py {SIZES} {STEPS} --activation relu --clip-grad 0 --hidden-dropout 0 --optimizer adafactor",
    f"pretrain_bert.py {SIZES} {STEPS} --optimizer lamb --zero-stage 1",
)
# One process makes all runs, so that what one imports is found after it.
PROGRAM = """
import contextlib, io, json, runpy, sys
runs, slow = json.loads(sys.argv[1])
found = []
for run in runs:
    sys.argv = run.split()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(sys.argv[0], run_name="__main__")
    found.append([sorted(sys.modules.keys() & set(slow)), said.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[list[str], str]]:
    """The slow modules that are there after each run, and what it printed."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([RUNS, list(SLOW)])], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return dict(zip(RUNS, json.loads(ran.stdout), strict=True))


@pytest.mark.parametrize("run", RUNS)
def test_a_run_imports_nothing_slow_that_it_does_not_use(found: dict[str, tuple[list[str], str]], run: str) -> None:
    modules, said = found[run]
    assert "step 2/2 | loss" in said and "predicted for a step" in said
    assert not modules, f"{', '.join(f'{name} ({SLOW[name]})' for name in modules)} were imported by {run}"
