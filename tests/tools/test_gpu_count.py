"""What is counted on a fake GPU: bytes of kernels by hand, and what a layer and the end of a step take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron3d_kernels import layer_norm, rotary
from megatron3d_kernels.launch import jit, tl

from tools.bench.triton_traffic import bytes_in_place, bytes_moved

pytestmark = pytest.mark.skipif(tl is None, reason="needs the triton package")

ROOT = Path(__file__).resolve().parents[2]


@jit
def _double(pointer: Any, BLOCK: tl.constexpr) -> None:
    """Through a helper, in place."""
    tl.store(pointer + tl.arange(0, BLOCK), 2 * tl.load(pointer + tl.arange(0, BLOCK)))


@jit
def _kernel(
    x_ptr: Any,
    y_ptr: Any,
    z_ptr: Any,
    sum_ptr: Any,
    HAS_Z: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """y += x, or y = x, and z where there is one; the sum by an atomic."""
    here = y_ptr + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.arange(0, BLOCK)).to(y_ptr.dtype.element_ty)
    if IN_PLACE:
        x += tl.load(here)
    if HAS_Z:
        _double(z_ptr, BLOCK)
    tl.store(here, x)
    tl.atomic_add(sum_ptr, tl.sum(x))


@pytest.mark.parametrize(("has_z", "in_place", "expected"), [(False, False, 6), (False, True, 10), (True, True, 12)])
def test_a_kernel_moves_what_it_loads_and_what_it_stores(has_z: bool, in_place: bool, expected: int) -> None:
    x, y, z, total = torch.ones(8).bfloat16(), torch.ones(8), torch.ones(8, dtype=torch.uint8), torch.ones(1)
    constants = {"HAS_Z": has_z, "IN_PLACE": in_place, "BLOCK": 8}
    assert bytes_moved(_kernel, (x, y, z, total), constants) == 8 * expected + 2 * 4
    assert bytes_in_place(_kernel, (x, y, z, total), constants) == 4 + 32 * in_place + 8 * has_z


def test_kernels_of_the_project_move_what_their_formulas_say() -> None:
    rows, width = 4, 16
    x, y, weight = torch.ones(rows, width).bfloat16(), torch.ones(rows, width).bfloat16(), torch.ones(width).bfloat16()
    stats = torch.ones(rows), torch.ones(rows)
    sizes, constants = (width, width, 1e-5), {"HAS_BIAS": False, "BLOCK": 16, "num_warps": 4}
    moved = bytes_moved(layer_norm._forward_kernel, (x, weight, weight, y, *stats, *sizes), constants)
    assert moved == 2 * (2 * rows * width + width) + 4 * 2 * rows
    table = torch.ones(3, 1).expand(3, 4)  # broadcast: its elements lie in one place
    arguments = (x, table, table, y, *range(14))
    constants = {"INTERLEAVED": False, "INVERSE": True, "BLOCK_HEADS": 1, "BLOCK_HALF": 4, "HAS_TAIL": True}
    assert bytes_moved(rotary._rotary_kernel, arguments, constants | {"BLOCK_TAIL": 4}) == 2 * 128 + 2 * 12


def counted(path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """What the command counts, in a process of its own."""
    command = [sys.executable, "-m", "tools.bench.gpu_count", *arguments, "--json", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Estimated for one H100 SXM" in ended.stdout
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Two models."""
    return counted(tmp_path_factory.mktemp("count") / "figures.json", "gpt-1.3b", "llama-8b")


@pytest.mark.slow
def test_the_tables_of_the_documentation_are_what_is_counted(tmp_path: Path) -> None:
    of_cases = counted(tmp_path / "all.json")
    by_blocks = "--fp8-format e4m3 --fp8-recipe blockwise"
    of_blocks = counted(tmp_path / "blocks.json", "llama-8b", "--flags", by_blocks)["llama-8b"]
    pages = {name: (ROOT / "docs" / name).read_text() for name in ("gpu.md", "fp8.md")}
    for name, found in of_cases.items():
        assert cells_of(found) in pages["gpu.md"], name
    for found in (of_blocks, *(of_cases[name] for name in of_cases if name == "llama-8b" or "fp8" in name)):
        assert cells_of(found) in pages["fp8.md"]


def cells_of(found: dict[str, Any]) -> str:
    """The cells of a case in the tables: kernels, megabytes, times, and MFU at each rate."""
    times = " + ".join(f"{value:.2f}" for value in found["estimates"]["mid"]["layer_ms"].values())
    rates = " / ".join(f"{found['estimates'][rate]['layer_mfu']:.0f}" for rate in ("low", "mid", "high"))
    return f" | {found['kernels']} | {found['elementwise_mb']:,} | {times} | {rates} % |"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("case", "most_kernels", "most_mb", "most_mb_in_place_once"),
    [("gpt-1.3b", 41, 760, 760), ("llama-8b", 28, 1620, 1600)],
)
def test_a_layer_takes_no_more_kernels_and_bytes(
    figures, case: str, most_kernels: int, most_mb: int, most_mb_in_place_once: int
) -> None:
    of_case = figures[case]
    assert of_case["elementwise_mb_in_place_once"] <= most_mb_in_place_once
    assert of_case["kernels"] <= most_kernels
    assert of_case["elementwise_mb"] <= most_mb
    assert of_case["end_bytes_a_parameter"] <= 34


@pytest.mark.heavy
def test_products_and_attention_are_those_of_the_formula(figures) -> None:
    hidden, length = 2048, 4096
    found = figures["gpt-1.3b"]
    assert found["product_tflop"] == pytest.approx(3 * 2 * length * 12 * hidden**2 / 1e12, abs=1e-3)
    assert found["attention_tflop"] == pytest.approx(3.5 * 2 * length**2 * hidden / 1e12, abs=1e-3)


@pytest.mark.heavy
def test_the_host_reads_nothing_within_a_micro_batch(figures) -> None:
    assert [one["reads_inside"] for one in figures.values()] == [0, 0]
    assert [one["reads"] for one in figures.values()] == [1, 1]
