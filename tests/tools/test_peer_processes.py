"""The processes of a benchmark's peers: one that hangs is named, and none outlives the benchmark, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.peers.start import PeerFailed, RankProcesses
from tools.bench.peers.work import Work

HANGING = "tests.tools.hanging_peer"
HANG = f"import sys; from {HANGING} import *; build(Work(corpus=sys.argv[1]))"
BENCHMARK = f"""
import sys
from tools.bench.peers.start import RunningPeer, exit_when_terminated
from tools.bench.peers.work import Peer, Work
exit_when_terminated()
RunningPeer(Peer("hanging", "{HANGING}", "torch", ""), Work(corpus=sys.argv[1]))
"""


@pytest.fixture
def alive(tmp_path: Path) -> Path:
    """A named pipe, of which every process of the hanging peer holds an end."""
    path = tmp_path / "alive"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        (1, "rank 0 gave no answer in 2 s and was killed: waiting for a train that has gone"),
        (2, "rank 1 ended with code 1: rank 1 has no ticket"),
    ],
    ids=["it hangs", "it hangs because another rank has ended"],
)
def test_a_peer_that_gives_no_answer_is_killed_and_named(alive: Path, ranks: int, named: str) -> None:
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    work = Work(ranks=ranks, timeout_s=2.0)
    processes = RankProcesses("hanging", [sys.executable, "-c", HANG, str(alive)], work)
    with pytest.raises(PeerFailed) as failure:
        processes.read_line(0)
    assert str(failure.value) == f"hanging: {named}"
    assert os.read(reader, 10) == b"x"
    assert os.read(reader, 10) == b"", "a process that the peer has started is left"


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda way: way.name)
def test_a_benchmark_that_is_interrupted_leaves_no_process(alive: Path, way: signal.Signals) -> None:
    benchmark = subprocess.Popen([sys.executable, "-c", BENCHMARK, str(alive)], stderr=subprocess.DEVNULL)
    with alive.open("rb", buffering=0) as reader:
        assert reader.read(1) == b"x"  # the peer hangs
        benchmark.send_signal(way)
        assert reader.read(1) == b"", "held open by a process that is left"
    assert benchmark.wait() != 0
