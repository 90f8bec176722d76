"""Starts the processes of a peer and asks them for steps, so that peers can take turns and a crash ends only its own.

Each rank is a process with a pipe of its own and the variables that every framework reads to find its rank. While
another peer has its turn, they wait for the next line and use no processor.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.bench.peers.work import Peer, Work
from tools.bench.rounds import TurnFailed


class PeerFailed(TurnFailed):
    """A process of a peer ended; the message has the last line that it printed."""


@dataclass(frozen=True)
class Turn:
    """What one turn gave.

    Attributes:
        seconds: of each step of rank 0.
        loss: of the last step, from the first rank that has one (in a pipeline that may be the last stage alone).
        peak_bytes: resident memory at its highest, of all ranks together.
        sent_bytes: what a rank sent in the last step, by axis and collective: the mean of the ranks.
    """

    seconds: list[float]
    loss: float
    peak_bytes: int
    sent_bytes: dict[str, float]


class RankProcesses:
    """The processes of one competitor, one command for each rank, and the pipes to them."""

    def __init__(self, name: str, command: list[str], work: Work) -> None:
        """Start them."""
        self._name = name
        self._directory = tempfile.TemporaryDirectory()
        self._processes = [
            self._start(command, work, rank, port) for port in [_free_port()] for rank in range(work.ranks)
        ]

    def write_line(self, line: str) -> None:
        """Write one line to every rank.

        Raises:
            PeerFailed: a process ended.
        """
        for rank, process in enumerate(self._processes):
            try:
                assert process.stdin is not None, "started with pipes"
                process.stdin.write(line + "\n")
                process.stdin.flush()
            except BrokenPipeError as error:
                raise self._failure(rank) from error

    def read_line(self, rank: int) -> str:
        """The next line that a rank prints.

        Raises:
            PeerFailed: the process ended.
        """
        stdout = self._processes[rank].stdout
        assert stdout is not None, "started with pipes"
        if not (line := stdout.readline()):
            raise self._failure(rank)
        return line

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._directory.cleanup()

    def _start(self, command: list[str], work: Work, rank: int, port: int) -> subprocess.Popen[str]:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": work.ranks, "LOCAL_WORLD_SIZE": work.ranks}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": work.threads}
        environment = os.environ | {name: str(value) for name, value in (ranks | meeting).items()}
        pipe = subprocess.PIPE
        with self._errors_of(rank).open("w") as errors:
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment)

    def _errors_of(self, rank: int) -> Path:
        return Path(self._directory.name) / f"errors_{rank}.txt"

    def _failure(self, rank: int) -> PeerFailed:
        code = self._processes[rank].wait()
        lines = self._errors_of(rank).read_text(errors="replace").strip().splitlines() or ["printed nothing"]
        self.close()
        return PeerFailed(f"{self._name}: rank {rank} ended with code {code}: {lines[-1].strip()}")


class RunningPeer:
    """The processes of one peer, ready for steps."""

    def __init__(self, peer: Peer, work: Work) -> None:
        """Start them and wait for their first step.

        Raises:
            PeerFailed: one of them ended.
        """
        command = [sys.executable, "-m", "tools.bench.peers.serve", peer.module, work.to_json()]
        self._processes = RankProcesses(peer.name, command, work)
        self._ranks = range(work.ranks)
        self.num_parameters: int = sum(ready["parameters"] for ready in self._answers())

    def run_steps(self, count: int) -> Turn:
        """Make this many steps on every rank.

        Raises:
            PeerFailed: a process ended.
        """
        self._processes.write_line(str(count))
        answers = self._answers()
        loss = next((one["loss"] for one in answers if one["loss"]), 0.0)
        sent: dict[str, float] = {}
        for answer in answers:
            for name, size in answer["sent_bytes"].items():
                sent[name] = sent.get(name, 0.0) + size / len(answers)
        return Turn(answers[0]["seconds"], loss, sum(one["peak_bytes"] for one in answers), sent)

    def close(self) -> None:
        """End the processes."""
        self._processes.close()

    def _answers(self) -> list[dict]:
        return [json.loads(self._processes.read_line(rank)) for rank in self._ranks]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
