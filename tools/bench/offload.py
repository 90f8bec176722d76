"""Times the files of offloaded state against dd and torch.save on the same disk: `python tools/bench/offload.py`.

All move the same bytes between memory and the directory, in turn, and the median of the rounds is printed: a disk has
no fastest round one could count on. `dd` moves zeros in pieces of the same size past the page cache, one after
another. `FileStore` is timed direct and through the page cache, with its checksums; the update is a fused AdamW of
fp32 master weights and moments streamed unit by unit, beside the same update of the same states in memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron3d.comm.device import empty_on_host
from megatron3d.offload.backing import FileBacking, HostBacking, StateBacking
from megatron3d.offload.block_file import CHUNK_BYTES
from megatron3d.offload.file_store import FileStore
from megatron3d.offload.record import record_of

CPU = torch.device("cpu")
NUM_UNITS = 8


def main() -> None:
    """Parse the options, time all ways in turn, print the table."""
    parser = argparse.ArgumentParser(
        description="Times the files of offloaded state against dd and torch.save on the same disk."
    )
    parser.add_argument("--megabytes", type=int, default=512, help="bytes moved by each way")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; the median is printed")
    parser.add_argument("--threads", type=int, default=4, help="threads of a FileStore")
    parser.add_argument("--directory", type=Path, help="where to write; default a temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        ways = _transfers(Path(root), options.megabytes, options.threads) | _updates(Path(root), options.megabytes)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeat):  # In turn, so that a busy disk is busy for all of them.
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    print("| way | median s | MB/s |\n|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.3f} | {options.megabytes / median:.0f} |")


def _transfers(root: Path, megabytes: int, num_threads: int) -> dict[str, Callable[[], object]]:
    num_bytes = megabytes * 10**6
    buffer = empty_on_host(num_bytes, CPU)
    buffer.copy_(torch.randint(256, (num_bytes,), dtype=torch.uint8))
    stores = {
        "direct": FileStore(root, "direct", num_threads=num_threads),
        "buffered": FileStore(root, "buffered", num_threads=num_threads, direct=False),
    }
    ways: dict[str, Callable[[], object]] = {
        "dd write, oflag=direct": lambda: _dd(f"if=/dev/zero of={root}/dd oflag=direct", megabytes),
        "dd read, iflag=direct": lambda: _dd(f"if={root}/dd of=/dev/null iflag=direct", megabytes),
        "torch.save, page cache": lambda: torch.save(buffer, root / "plain.pt"),
        "torch.load, page cache": lambda: torch.load(root / "plain.pt", weights_only=True),
    }
    for kind, store in stores.items():
        if kind == "direct" and not store.file.is_direct:
            print(f"{root} does not take direct access: both stores are buffered")
        store.reserve("state", num_bytes)
        ways[f"FileStore write, {kind}"] = lambda store=store: store.start_write("state", buffer).wait()
        ways[f"FileStore read, {kind}"] = lambda store=store: store.start_read("state", buffer).wait()
    return ways


def _dd(operands: str, megabytes: int) -> None:
    count = megabytes * 10**6 // CHUNK_BYTES
    command = ["dd", *operands.split(), f"bs={CHUNK_BYTES}", f"count={count}", "status=none"]
    subprocess.run(command, check=True)


def _updates(root: Path, megabytes: int) -> dict[str, Callable[[], object]]:
    store = FileStore(root, "states")
    backings = {"in memory": HostBacking(CPU), f"in files ({'direct' if store.file.is_direct else 'buffered'})": None}
    backings = {name: backing or FileBacking(store, CPU) for name, backing in backings.items()}
    numel = megabytes * 10**6 // (12 * NUM_UNITS)
    gradient = torch.randn(numel)
    for backing in backings.values():
        for unit in range(NUM_UNITS):
            backing.add(
                str(unit), record_of((name, torch.float32, numel) for name in ("master", "exp_avg", "exp_avg_sq"))
            )
    return {
        f"AdamW over states {name} (bytes held)": lambda backing=backing: _update(backing, gradient)
        for name, backing in backings.items()
    }


def _update(backing: StateBacking, gradient: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    step = torch.zeros(())

    def work(name: str, fields: dict[str, torch.Tensor]) -> None:
        parameter.data, parameter.grad = fields["master"], gradient
        state = {"step": step, "exp_avg": fields["exp_avg"], "exp_avg_sq": fields["exp_avg_sq"]}
        optimizer.state[parameter] = state
        optimizer.step()
        parameter.grad = None

    backing.for_each([str(unit) for unit in range(NUM_UNITS)], work)


if __name__ == "__main__":
    main()
