"""Which implementation runs, where, and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron3d_kernels import KERNEL_NAMES, KernelError, Registry, TritonSupport
from megatron3d_kernels.rms_norm import RMS_NORM

COMPILED = TritonSupport(installed=True, interpreted=False, detail="Triton 9.9")
INTERPRETED = TritonSupport(installed=True, interpreted=True, detail="Triton 9.9")
MISSING = TritonSupport(installed=False, interpreted=False, detail="Triton cannot be imported (no module)")
ROOT = Path(__file__).resolve().parents[2]


class Placed:
    """Stands for a tensor on a device that this machine may not have: `pick` asks for nothing else."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device(device_type), dtype


@pytest.mark.parametrize("support", [COMPILED, INTERPRETED, MISSING], ids=["compiled", "interpreted", "missing"])
@pytest.mark.parametrize("force", [None, "reference", {"rms_norm": "reference"}, {"layer_norm": "reference"}])
def test_pick_does_what_choose_says(support: TritonSupport, force: str | dict[str, str] | None) -> None:
    registry = Registry(force, support=support)
    for device_type in ("cpu", "cuda", "meta"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            said = registry.choose("rms_norm", device_type, dtype)
            picked = registry.pick(RMS_NORM, Placed(device_type, dtype))  # type: ignore[arg-type]
            assert picked is (RMS_NORM.triton if said.implementation == "triton" else RMS_NORM.reference)
            expected = device_type == "cuda" and dtype != torch.float64 and support is COMPILED
            expected = expected and force in (None, {"layer_norm": "reference"})
            assert said.implementation == ("triton" if expected else "reference")


@pytest.mark.parametrize(
    ("support", "device_type", "dtype", "reason"),
    [
        (COMPILED, "cuda", torch.bfloat16, "Triton 9.9"),
        (COMPILED, "cpu", torch.bfloat16, "run on CUDA devices, not on cpu"),
        (COMPILED, "cuda", torch.float64, "too coarse for float64"),
        (INTERPRETED, "cuda", torch.float32, "interpreter is on"),
        (MISSING, "cuda", torch.float32, "cannot be imported"),
    ],
)
def test_choice_gives_its_reason(support: TritonSupport, device_type: str, dtype: torch.dtype, reason: str) -> None:
    assert reason in Registry(support=support).choose("rotary", device_type, dtype).reason


def test_forced_triton_runs_where_it_can_and_is_refused_elsewhere() -> None:
    compiled, interpreted = Registry("triton", support=COMPILED), Registry("triton", support=INTERPRETED)
    assert compiled.pick(RMS_NORM, Placed("cuda", torch.float16)) is RMS_NORM.triton  # type: ignore[arg-type]
    assert interpreted.pick(RMS_NORM, torch.ones(1)) is RMS_NORM.triton
    for refuse in (
        lambda: compiled.pick(RMS_NORM, torch.ones(1)),
        lambda: compiled.choose("rms_norm", "cpu", torch.float32),
    ):
        _refused(refuse, r"rms_norm is forced to 'triton' for a torch.float32 tensor on cpu, but .* CUDA devices")
    _refused(lambda: interpreted.pick(RMS_NORM, torch.ones(1, dtype=torch.float64)), "too coarse for float64")
    _refused(lambda: Registry({"rotary": "triton"}, support=MISSING), "cannot be imported .*; install triton")


def _refused(action: Callable[[], object], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        action()


def test_unknown_kernels_and_implementations_are_refused() -> None:
    _refused(lambda: Registry({"rope": "triton"}), "'rope' does not exist; the kernels are layer_norm")
    _refused(lambda: Registry({"rotary": "cuda"}), "rotary cannot be forced to 'cuda'; use one of reference, triton")
    _refused(lambda: Registry("fast"), "cannot be forced to 'fast'")


def test_explain_names_every_kernel_device_and_reason() -> None:
    table = Registry({"rotary": "reference"}, support=COMPILED).explain()
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["kernel", "device", "runs", "dtypes", "because"]
    assert {line[0] for line in lines[1:-1]} == set(KERNEL_NAMES)
    assert "fp32 buffers on cpu by a product that is rounded" in " ".join(lines[-1])
    assert ["rms_norm", "cuda", "triton", "float32,bfloat16,float16", "Triton", "9.9"] in lines
    assert ["rotary", "cuda", "reference", "float32,bfloat16,float16,float64", "forced", "by", "the", "caller"] in lines
    assert "error" in Registry("triton", support=COMPILED).explain(["rotary"])


def test_package_works_without_triton_and_says_so(tmp_path: Path) -> None:
    """A process in which `import triton` fails still has every reference."""
    (tmp_path / "triton.py").write_text("raise ImportError('hidden by a test')\n")
    program = (
        "import torch; from megatron3d_kernels import Registry; r = Registry();"
        "x = torch.randn(2, 8, requires_grad=True); r.swiglu(r.rms_norm(x, torch.ones(8))).sum().backward();"
        "print(r.choose('rms_norm', 'cuda', torch.float32))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "implementation='reference'" in done.stdout
    assert "Triton cannot be imported (hidden by a test)" in done.stdout
