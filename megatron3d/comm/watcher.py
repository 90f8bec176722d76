"""Watcher: ends a rank whose wait for the others takes too long while its main thread cannot be asked.

gloo raises in Python when a collective takes too long. NCCL does not: its `wait` lets the device wait, the main thread
stops later, in C, where a value is read back, and torch's own watchdog aborts the process at the timeout, without a
sentence, a status or an exit code. So a thread looks at what the meter has been waiting for longest. The process groups
of NCCL get `NCCL_GRACE` more time than the user asked for, so that the watcher comes first.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from megatron3d.comm.meter import Meter, Wait

POLL_S = 0.5
GRACE_S = 3.0  # for backends that raise by themselves, whose error says more
NCCL_GRACE = timedelta(minutes=2)  # for the watcher, its roll call and the files it writes
_STDERR = 2


class Watcher:
    """Calls `on_stuck` once, in its thread, when a wait of `meter` is older than `limit`."""

    def __init__(self, meter: Meter, limit: timedelta, on_stuck: Callable[[Wait], None]) -> None:
        self._meter, self._limit_s, self._on_stuck = meter, limit.total_seconds() + GRACE_S, on_stuck
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more; a call of `on_stuck` under way goes on."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            wait = self._meter.oldest_wait()
            if wait is not None and time.monotonic() - wait.began_s > self._limit_s:
                faulthandler.dump_traceback(file=_STDERR, all_threads=True)
                self._on_stuck(wait)
                return


def group_timeout(timeout: timedelta, device: torch.device) -> timedelta:
    """After how long the process groups of a device fail by themselves, where the user asked for `timeout`."""
    return timeout + NCCL_GRACE if device.type == "cuda" else timeout


def flight_record() -> bytes:
    """The latest collectives of this process as JSON, from torch's flight recorder, which keeps 2,000 of them unless
    TORCH_FR_BUFFER_SIZE says otherwise; empty where this torch has none."""
    c10d = getattr(torch._C, "_distributed_c10d", None)
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # of a build with NCCL; of any, for other backends
        dump = getattr(c10d, name, None)
        if dump is not None:
            found: bytes | str = dump()
            record = found.encode() if isinstance(found, str) else found
            return record if b'"entries"' in record else b""  # torch 2.11 records nothing of gloo
    return b""


def flight_record_path(directory: Path, rank: int) -> Path:
    """Where that of a rank is written, in the --save directory."""
    return directory / f"flight_recorder_rank_{rank}.json"


def flight_record_paths(directory: Path) -> list[Path]:
    """Those that are there, of this run or of an earlier one."""
    return sorted(directory.glob("flight_recorder_rank_*.json"))
