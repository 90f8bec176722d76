"""Times a checkpoint of a given size against torch.save and torch.load, in one run: `python tools/bench/checkpoint.py`.

Both are given the same fp32 tensors in one process and replace what the round before wrote: a new file or directory
is written, takes the name, and the old one goes. `torch.save` takes no checksum and does not wait for the disk, so it
is also timed with an fsync. Reading is from the page cache: it measures the program, not the disk. Prints a Markdown
table of the fastest round of each way, the one least disturbed by whatever else the machine does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron3d.checkpoint.load import load_tensors
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.params.boxes import Box, ShardView

TENSOR_SHAPE = (1024, 1024)  # 4 MiB of fp32, about one weight of a small model


def main() -> None:
    """Parse the options, time all ways in turn, print the table."""
    parser = argparse.ArgumentParser(
        description="Times a checkpoint of a given size against torch.save and torch.load, in one run."
    )
    parser.add_argument("--megabytes", type=int, default=200, help="size of the state")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; the fastest is printed")
    parser.add_argument("--directory", type=Path, help="where to write; default a temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        ways = _ways(Path(root), options.megabytes)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeat):  # In turn, so that a busy machine is busy for all of them.
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    _print(seconds, options.megabytes)


def _ways(root: Path, megabytes: int) -> dict[str, Callable[[], object]]:
    names = [f"model/layers.{n}.weight" for n in range(max(1, megabytes * 10**6 // (4 * TENSOR_SHAPE[0] * 1024)))]
    box = Box((0, 0), TENSOR_SHAPE)
    views = {name: ShardView(TENSOR_SHAPE, (box,), torch.randn(box.numel)) for name in names}
    plain = {name: view.data.view(TENSOR_SHAPE) for name, view in views.items()}
    file, fresh = root / "plain.pt", root / "fresh.pt"

    def save() -> None:
        save_checkpoint(root, 1, views, documents={}, keep_last=None, group=None, rank=0, world_size=1)

    def torch_save(*, sync: bool) -> None:
        torch.save(plain, fresh)
        if sync:
            with fresh.open("rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(fresh, file)

    def torch_load() -> None:
        for name, value in torch.load(file, weights_only=True).items():
            plain[name].copy_(value)

    return {
        "torch.save": lambda: torch_save(sync=False),
        "torch.save and fsync": lambda: torch_save(sync=True),
        "save_checkpoint": save,
        "torch.load and copy": torch_load,
        "load_tensors": lambda: load_tensors(root / "iter_0000001", views, group=None),
    }


def _print(seconds: dict[str, list[float]], megabytes: int) -> None:
    fastest = {name: min(times) for name, times in seconds.items()}
    base = {"save_checkpoint": "torch.save and fsync", "load_tensors": "torch.load and copy"}
    print("| way | fastest s | MB/s | ratio |\n|---|---|---|---|")
    for name, value in fastest.items():
        ratio = f"{value / fastest[base[name]]:.2f} x {base[name]}" if name in base else ""
        print(f"| {name} | {value:.3f} | {megabytes / value:.0f} | {ratio} |")


if __name__ == "__main__":
    main()
