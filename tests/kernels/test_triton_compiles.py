"""The Triton kernels compile to machine code for GPUs, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the triton package")

pytestmark = pytest.mark.heavy
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "architecture", [pytest.param("80", marks=pytest.mark.slow), "90", pytest.param("100", marks=pytest.mark.slow)]
)
def test_every_kernel_compiles_for_nvidia_gpus(architecture: str, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.run_compiled", architecture]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    outcomes: dict[str, str] = printed["outcomes"]
    assert {label.split(" ")[0] for label in outcomes} == {*printed["kernels"]}
    assert len(printed["kernels"]) >= 10
    assert not {label: problem for label, problem in outcomes.items() if problem}
