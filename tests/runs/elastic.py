"""Runs under torchrun itself, for tests of what an elastic agent does: restarts, signals that it passes on, its report.

Starting one costs seconds, so whatever does not need the agent is tested without it (tests/runs/harness.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.runs.harness import ROOT, SCRIPT

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@dataclass
class Elastic:
    """A torchrun that was started, and what it and its workers print."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        """Everything printed so far."""
        return self.log.read_text()

    def wait(self, *, timeout_s: float = 120.0) -> int:
        """The exit code of torchrun."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun still runs after {timeout_s} s; it said:\n{self.said}") from None

    def wait_for(self, text: str, *, timeout_s: float = 120.0) -> None:
        """Return once this was printed."""
        deadline = time.monotonic() + timeout_s
        while text not in self.said:
            assert self.process.poll() is None, f"torchrun ended with {self.process.returncode}:\n{self.said}"
            assert time.monotonic() < deadline, f"{text!r} is not there after {timeout_s} s:\n{self.said}"
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """The process ids of its workers."""
        return children(self.process.pid)


def children(pid: int) -> list[int]:
    """The process ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())


@contextlib.contextmanager
def torchrun(
    log: Path, options: Sequence[str], argv: Sequence[str], *, script: Path = SCRIPT, **environment: str
) -> Iterator[Elastic]:
    """Start torchrun; what still runs at the end of the block is killed, workers first."""
    place = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    place |= environment
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*TORCHRUN, *options, str(script), *argv], env=place, stdout=output, stderr=output, cwd=ROOT
        )
    elastic = Elastic(process, log)
    try:
        yield elastic
    finally:
        if process.poll() is None:
            for pid in [*elastic.workers(), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(10)
