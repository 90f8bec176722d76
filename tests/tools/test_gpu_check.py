"""tools/bench/gpu_check.py without a GPU: says why it does nothing, and runs its parts on a CPU when asked."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.kernels.cases import CASES
from tests.kernels.kernel_cases import DTYPES
from tools.bench.gpu_check import LIMITS_S
from tools.bench.gpu_parts import PARTS, kernel_cases, lines_that_wait

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = ("--device", "cpu", "--tiny", "--steps", "2")
LAST = {"part", "ok", "seconds"}
QUICK = [part for part in PARTS if part not in ("ckpt", "layouts")]


def findings(module: str, *flags: str, code: int = 0) -> list[dict[str, object]]:
    """What a tool prints, which ends with this exit code."""
    command = [sys.executable, "-m", f"tools.bench.{module}", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert ended.returncode == code, ended.stdout[-3000:] + ended.stderr[-3000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


def require_all_ok(found: list[dict[str, object]], parts: list[str]) -> None:
    """Every part found something, nothing failed, and each says at its end that it was ok."""
    assert not [one for one in found if "error" in one or one.get("ok") is False]
    assert [one["part"] for one in found if {*one} == LAST] == parts
    assert {one["part"] for one in found if {*one} != LAST} == {*parts}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU to check")
@pytest.mark.heavy
def test_without_a_gpu_one_line_says_why_nothing_is_checked() -> None:
    (only,) = findings("gpu_check")
    assert "sees no GPU" in str(only["skipped"])


@pytest.mark.heavy
def test_the_parts_run_on_a_cpu_and_fail_nowhere(tmp_path: Path) -> None:
    require_all_ok(findings("gpu_parts", *QUICK, *ON_CPU, "--out", str(tmp_path)), QUICK)


@pytest.mark.heavy
def test_a_part_that_takes_too_long_costs_itself_alone(tmp_path: Path) -> None:
    found = findings("gpu_check", *ON_CPU, "--parts", "ckpt", "--limit", "1", "--out", str(tmp_path), code=1)
    assert found == [{"part": "ckpt", "error": "not done after 1 s"}, {"parts": {"ckpt": "timed out"}}]


def test_what_waits_for_a_gpu_is_told_from_other_warnings() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        # What torch 2.11's `set_sync_debug_mode` says when it is called, and what its mode says of a wait.
        warnings.warn_explicit(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            UserWarning,
            "gpu_parts.py",
            1,
        )
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "step.py", 108)
    assert lines_that_wait(found) == ["step.py:108"]


def test_every_part_has_a_time_limit() -> None:
    assert [*LIMITS_S] == [*PARTS]


def test_a_kernel_that_fails_is_a_line_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("error 2 over 1")

    monkeypatch.setitem(CASES, "broken", fail)
    *lines, last = kernel_cases("reference", ["broken", "adam"], torch.device("cpu"), workers=1)
    said = {"kernel": "broken", "implementation": "reference", "error": "error 2 over 1"}
    assert lines == [said | {"dtype": name} for name in DTYPES]
    assert last == {"implementation": "reference", "passed": len(DTYPES), "failed": len(DTYPES), "ok": False}


@pytest.mark.slow
def test_the_cases_of_kernels_run_in_several_processes() -> None:
    (only,) = kernel_cases("reference", ["adam", "dropout_row_keys"], torch.device("cpu"), workers=2)
    assert only == {"implementation": "reference", "passed": 2 * len(DTYPES), "failed": 0, "ok": True}


@pytest.mark.slow
def test_all_parts_run_in_one_call_on_a_cpu(tmp_path: Path) -> None:
    *found, last = findings("gpu_check", *ON_CPU, "--out", str(tmp_path))
    require_all_ok(found, [*PARTS])
    assert last == {"parts": dict.fromkeys(PARTS, "ok")}
