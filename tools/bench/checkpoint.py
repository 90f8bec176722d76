"""Times a checkpoint beside other ways to store the same tensors, in one run: `python -m tools.bench.checkpoint`.

All are given the same fp32 tensors in one process and replace what the round before wrote: a new file or directory is
written, takes the name, and the old one goes. Ours takes checksums and waits for the disk; the others take none, and
are also timed with an fsync, or alone with one where they have it. Before each turn the disk finishes what the turn
before has left to the kernel, and one round before the first is not counted: it pays for the machine's fresh memory.
Reading is from the page cache, into which all files are brought first: it measures the program, not the disk. Prints
a Markdown table; the ratios are taken within rounds, in which all take turns.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron3d.checkpoint import publish
from megatron3d.checkpoint.async_save import AsyncSave
from megatron3d.checkpoint.load import load_tensors
from megatron3d.checkpoint.save import save_checkpoint
from megatron3d.params.boxes import Box, ShardView
from megatron3d.storage.checksum import LIBRARY, crc32
from tools.bench.peers import torch_dcp
from tools.bench.rounds import speed_ratio, take_turns
from tools.bench.tables import Table

TENSOR_SHAPE = (1024, 1024)  # 4 MiB of fp32, about one weight of a small model
SAVE, LOAD, CHECKSUMS = "save_checkpoint", "load_tensors", "checksums alone"
COLUMNS = ("way", "median s", "fastest s", "MB/s", "megatron3d to it")
STALL = "--async-save"
STALL_COLUMNS = ("way", "median s", "longest s", "s for each GB", "megatron3d to it")


def main() -> None:
    """Parse the options, time all ways in turn, print the table."""
    parser = argparse.ArgumentParser(
        description="Times a checkpoint of a given size beside other ways to store tensors, in one run."
    )
    parser.add_argument("--megabytes", type=int, default=200, help="size of the state")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--directory", type=Path, help="where to write; default a temporary directory")
    options = parser.parse_args()
    for compare in (compare_checkpoints, compare_stalls):
        print(compare(options.megabytes, num_rounds=options.repeat, directory=options.directory), "\n")


def compare_checkpoints(megabytes: int, *, num_rounds: int, directory: Path | None = None) -> Table:
    """The table of all ways to save and to load."""
    with tempfile.TemporaryDirectory(dir=directory) as root:
        ways = {name: partial(_timed_s, name, way, Path(root)) for name, way in _ways(Path(root), megabytes).items()}
        take_turns(ways, 1)
        seconds, _ = take_turns(ways, num_rounds)
    checksums_s = statistics.median(seconds.pop(CHECKSUMS))
    threads = torch.get_num_threads()
    caption = f"{megabytes} MB of fp32 in one process, threads of a process {threads}: {num_rounds} rounds."
    table = Table("checkpoint", caption, COLUMNS)
    for name, times in seconds.items():
        ours = LOAD if "load" in name else SAVE
        ratio = str(speed_ratio(seconds[ours], times)) if name != ours else ""
        median_s = statistics.median(times)
        table.rows.append((name, f"{median_s:.3f}", f"{min(times):.3f}", f"{megabytes / median_s:.0f}", ratio))
    parts = (f"{checksums_s / statistics.median(seconds[way]):.0%} of the time of {way}" for way in (SAVE, LOAD))
    table.notes.append(f"checksums of all bytes alone ({LIBRARY}): {checksums_s:.3f} s, {' and '.join(parts)}")
    return table


def compare_stalls(megabytes: int, *, num_rounds: int, directory: Path | None = None) -> Table:
    """How long training stands still for a save that is written while it goes on, ours and DCP's.

    Ours stands still twice, for the copy and for publishing. Both have written once before they are timed.
    """
    views = _views(megabytes)
    plain = {name: view.data.view(TENSOR_SHAPE) for name, view in views.items()}
    saves = AsyncSave(group=None, rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=directory) as root, torch_dcp.alone(), closing(saves):
        steps = itertools.count(1)
        ways: dict[str, Callable[[], float]] = {
            STALL: lambda: _stall_s(saves, Path(root), next(steps), views),
            "DCP async_save": torch_dcp.AsyncSaves(plain, Path(root, "new"), keeps_buffers=False).stall_s,
            "DCP async_save, buffers kept": torch_dcp.AsyncSaves(plain, Path(root, "kept"), keeps_buffers=True).stall_s,
        }
        take_turns(ways, 1)
        seconds, _ = take_turns(ways, num_rounds)
    caption = (
        f"Training stands still for a save of {megabytes} MB of fp32 that is written while it goes on, in one process, "
        f"threads of a process {torch.get_num_threads()}: {num_rounds} rounds."
    )
    table = Table("stall", caption, STALL_COLUMNS)
    for name, times in seconds.items():
        median_s, ratio = statistics.median(times), str(speed_ratio(seconds[STALL], times)) if name != STALL else ""
        table.rows.append((name, f"{median_s:.3f}", f"{max(times):.3f}", f"{median_s / megabytes * 1000:.3f}", ratio))
    return table


def _stall_s(saves: AsyncSave, root: Path, step: int, views: Mapping[str, ShardView]) -> float:
    os.sync()
    start_s = time.perf_counter()
    path = saves.begin(root, step, views, documents={})
    begun_s = time.perf_counter()
    while not saves.is_written():
        time.sleep(0.001)
    written_s = time.perf_counter()
    saves.finish()
    stall_s = begun_s - start_s + time.perf_counter() - written_s
    publish.prune(path, 1)
    return stall_s


def _timed_s(name: str, way: Callable[[], object], root: Path) -> float:
    os.sync()
    if "load" in name:
        _fill_page_cache(root)
    start_s = time.perf_counter()
    way()
    return time.perf_counter() - start_s


def _fill_page_cache(root: Path) -> None:
    scratch = bytearray(8 << 20)
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(scratch):
                    pass


def _views(megabytes: int) -> dict[str, ShardView]:
    names = [f"model/layers.{n}.weight" for n in range(max(1, megabytes * 10**6 // (4 * TENSOR_SHAPE[0] * 1024)))]
    box = Box((0, 0), TENSOR_SHAPE)
    return {name: ShardView(TENSOR_SHAPE, (box,), torch.randn(box.numel)) for name in names}


def _ways(root: Path, megabytes: int) -> dict[str, Callable[[], object]]:
    """By name, the savers before the loaders, so that the first round has something to load."""
    views = _views(megabytes)
    plain = {name: view.data.view(TENSOR_SHAPE) for name, view in views.items()}
    torch_file, safe_file = root / "plain.pt", root / "plain.safetensors"

    def save() -> None:
        save_checkpoint(root, 1, views, documents={}, keep_last=None, group=None, rank=0, world_size=1)

    def take_checksums() -> None:
        for view in views.values():
            crc32(view.data.view(torch.uint8).numpy().data)

    def copy(loaded: dict[str, torch.Tensor]) -> None:
        for name, value in loaded.items():
            plain[name].copy_(value)

    write_torch, write_safe = partial(torch.save, plain), partial(save_file, plain)
    return {
        "torch.save": lambda: _replace(torch_file, write_torch, sync=False),
        "torch.save and fsync": lambda: _replace(torch_file, write_torch, sync=True),
        "safetensors save and fsync": lambda: _replace(safe_file, write_safe, sync=True),
        "DCP save and fsync": lambda: torch_dcp.save(plain, root / "dcp"),
        SAVE: save,
        "torch.load and copy": lambda: copy(torch.load(torch_file, weights_only=True)),
        "safetensors load and copy": lambda: copy(load_file(safe_file)),
        "DCP load": lambda: torch_dcp.load(plain, root / "dcp"),
        LOAD: lambda: load_tensors(root / "iter_0000001", views, group=None),
        CHECKSUMS: take_checksums,
    }


def _replace(file: Path, write: Callable[[Path], object], *, sync: bool) -> None:
    """Write a new file, and give it the name of the old one."""
    fresh = file.with_name("fresh")
    write(fresh)
    if sync:
        with fresh.open("rb+") as handle:
            os.fsync(handle.fileno())
    os.replace(fresh, file)


if __name__ == "__main__":
    main()
