"""A peer of the benchmarks that starts a process of its own and then never answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import NoReturn

from tools.bench.peers.work import Work


def build(work: Work) -> NoReturn:
    """Hang; `work.corpus` is a named pipe, which stays open for as long as anything of this peer lives."""
    if os.environ["RANK"] == "1":
        raise SystemExit("rank 1 has no ticket")
    handle = os.open(work.corpus, os.O_WRONLY)
    print("waiting for a train that has gone", file=sys.stderr, flush=True)
    subprocess.Popen(["sleep", "1000"], pass_fds=[handle])
    os.write(handle, b"x")
    while True:
        signal.pause()
