"""tools/bench/gpu_check.py without a GPU: says why it does nothing, and runs its parts on a CPU when asked."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench" / "gpu_check.py"


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run the tool as a script; gives its findings."""

    def run(*flags: str) -> list[dict[str, object]]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--out", str(tmp_path), *flags])
        runpy.run_path(str(TOOL), run_name="__main__")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU to check")
def test_without_a_gpu_one_line_says_why_nothing_is_checked(findings) -> None:
    (only,) = findings()
    assert "sees no GPU" in str(only["skipped"])


@pytest.mark.parametrize("part", ["mfu", "zero"])
@pytest.mark.heavy
def test_a_part_runs_on_a_cpu_and_fails_nowhere(findings, part: str) -> None:
    found = findings("--device", "cpu", "--tiny", "--steps", "2", "--part", part)
    assert len(found) > 1 and all(one["part"] == part for one in found)
    assert not [one for one in found if "error" in one]
