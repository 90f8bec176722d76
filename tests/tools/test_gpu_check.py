"""tools/bench/gpu_check.py without a GPU: says why it does nothing, and runs its parts on a CPU when asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.bench.gpu_check import LIMITS_S
from tools.bench.gpu_parts import PARTS

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


def test_every_part_has_a_time_limit() -> None:
    assert [*LIMITS_S] == [*PARTS]


@pytest.mark.slow
def test_all_parts_run_in_one_call_on_a_cpu(tmp_path: Path) -> None:
    *found, last = findings("gpu_check", *ON_CPU, "--out", str(tmp_path))
    require_all_ok(found, [*PARTS])
    assert last == {"parts": dict.fromkeys(PARTS, "ok")}
