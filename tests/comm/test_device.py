"""Which device a rank gets, and the remedy where it cannot be had."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron3d.comm.device import pick_device, sent, set_fp32_precision
from megatron3d.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("num_gpus", "cuda_version", "sentence"),
    [
        (0, None, "is a build without CUDA; install a CUDA build of torch, or use --device cpu."),
        (0, "12.8", "torch sees none on this machine; look at nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (
            2,
            "12.8",
            "for each of the 4 ranks of this machine, and torch sees 2; start torchrun with --nproc-per-node 2",
        ),
    ],
)
def test_the_remedy_for_a_gpu_that_is_not_there_fits_the_cause(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, cuda_version: str | None, sentence: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    with pytest.raises(ConfigError) as raised:
        pick_device("cuda", local_rank=0, local_world_size=4)
    assert str(raised.value).startswith("--device cuda needs") and sentence in str(raised.value)
    assert pick_device(None, local_rank=0, local_world_size=4) == torch.device("cpu")


def test_fp32_products_get_the_precision_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    set_fp32_precision(cpu, "highest")
    set_fp32_precision(gpu, "highest")
    assert asked == []  # as torch begins
    set_fp32_precision(gpu, "high")
    assert asked == ["high"]
    with pytest.raises(ConfigError, match="--fp32-matmul-precision medium is for GPUs, and the device is cpu"):
        set_fp32_precision(cpu, "medium")
    assert asked == ["high"]


def test_what_is_sent_to_a_gpu_is_pinned_first_and_nothing_waits_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    x = torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **options: seen.append((device.type, options)) or self)
    assert sent(x, torch.device("cuda", 0)) is x
    assert seen == ["pinned", ("cuda", {"non_blocking": True})]
    seen.clear()
    sent(x, torch.device("cpu"))
    assert seen == [("cpu", {"non_blocking": True})]


ROOMS_OF_A_STEP = ("kernels/megatron3d_kernels", *(f"megatron3d/{room}" for room in ("nn", "moe", "tensor", "models")))
FILES_OF_A_STEP = ("megatron3d/train/step.py", "megatron3d/train/random_ltd.py", "megatron3d/optim/adafactor.py")


def test_what_the_host_has_goes_to_a_device_without_a_wait_for_it() -> None:
    files = [path for room in ROOMS_OF_A_STEP for path in (ROOT / room).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {call}"
        for path in (*files, *(ROOT / name for name in FILES_OF_A_STEP))
        if path.name not in ("bench.py", "launch.py")
        for line, call in waiting_copies(path.read_text())
    ]
    assert not found, f"{found}: a GPU is waited for; use `sent`"


def test_a_copy_that_waits_is_known_by_its_source() -> None:
    source = "a = torch.tensor([1], device=x.device)\nb = rows.to(device)\nc = torch.tensor([1])\nd = sent(c, device)"
    assert [line for line, _ in waiting_copies(source)] == [1, 2]


def waiting_copies(source: str) -> Iterator[tuple[int, str]]:
    """Calls that make a tensor of Python's numbers on a device, or bring one there by `to`, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        makes = node.func.attr in ("tensor", "as_tensor") and any(given.arg == "device" for given in node.keywords)
        where = ast.unparse(node.args[0]) if node.args else ""
        brings = node.func.attr == "to" and where.rpartition(".")[2] == "device"
        if makes or brings:
            yield node.lineno, ast.unparse(node)
