"""The Triton kernels on CPU, through Triton's interpreter, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cases import CASES
from tests.kernels.kernel_cases import DTYPES

pytest.importorskip("triton", reason="needs the triton package")

pytestmark = pytest.mark.heavy
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What went wrong in each case, nothing where it holds; one process for all of them."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.run_interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_interpreted_triton_equals_the_float64_formula(case: str, dtype: str, outcomes: dict[str, str]) -> None:
    problem = outcomes[f"{case}-{dtype}"]
    assert not problem, problem
