"""No Triton kernel keeps in memory what it should keep in registers, at the launches of real models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.kernel_resources import MODELS

pytest.importorskip("triton", reason="needs the triton package")

ROOT = Path(__file__).resolve().parents[2]


def rows(tmp_path: Path, *arguments: str) -> list[dict[str, object]]:
    """The rows of the table, made in a process of its own with an empty cache."""
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "tools.bench.kernel_resources", *arguments, "--json", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=570, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(path.read_text())


def require_no_spills(found: list[dict[str, object]]) -> None:
    """Of kernels with rows of up to 8,192 elements."""
    assert not [row for row in found if row["spilled_bytes"] and row["model"] != "gpt-175b"]
    assert all(0 < int(str(row["registers"])) <= 255 for row in found)


@pytest.mark.heavy
def test_no_kernel_of_a_llama_of_hidden_size_4096_spills(tmp_path: Path) -> None:
    found = rows(tmp_path, "llama-8b", "--arch", "90")
    require_no_spills(found)
    names = {str(row["kernel"]).split(".")[0] for row in found}
    assert {"rms_norm", "gated_activation", "query_key_norm"} <= names


@pytest.mark.slow
def test_no_kernel_spills_up_to_hidden_size_8192_on_any_architecture(tmp_path: Path) -> None:
    found = rows(tmp_path)
    require_no_spills(found)
    assert {row["architecture"] for row in found} == {80, 90, 100}
    assert {row["model"] for row in found} == {*MODELS}
