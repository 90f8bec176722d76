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


class RunningPeer:
    """The processes of one peer, ready for steps."""

    def __init__(self, peer: Peer, work: Work) -> None:
        """Start them and wait for their first steps.

        Raises:
            PeerFailed: one of them ended.
        """
        self.peer = peer
        self._directory = tempfile.TemporaryDirectory()
        self._processes = [self._start(work, rank, port) for port in [_free_port()] for rank in range(work.ranks)]
        ready = self._read_all()
        self.num_parameters: int = sum(one["parameters"] for one in ready)
        self.first_loss: float = ready[0]["first_loss"]

    def run_steps(self, count: int) -> Turn:
        """Make this many steps on every rank.

        Raises:
            PeerFailed: a process ended.
        """
        for rank, process in enumerate(self._processes):
            try:
                assert process.stdin is not None, "started with pipes"
                process.stdin.write(f"{count}\n")
                process.stdin.flush()
            except BrokenPipeError as error:
                raise self._failure(rank) from error
        answers = self._read_all()
        loss = next((one["loss"] for one in answers if one["loss"]), 0.0)
        sent: dict[str, float] = {}
        for answer in answers:
            for name, count in answer["sent_bytes"].items():
                sent[name] = sent.get(name, 0.0) + count / len(answers)
        return Turn(answers[0]["seconds"], loss, sum(one["peak_bytes"] for one in answers), sent)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._directory.cleanup()

    def _start(self, work: Work, rank: int, port: int) -> subprocess.Popen[str]:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": work.ranks, "LOCAL_WORLD_SIZE": work.ranks}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": work.threads}
        environment = os.environ | {name: str(value) for name, value in (ranks | meeting).items()}
        with self._errors_of(rank).open("w") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "tools.bench.peers.serve", self.peer.module, work.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def _errors_of(self, rank: int) -> Path:
        return Path(self._directory.name) / f"errors_{rank}.txt"

    def _read_all(self) -> list[dict]:
        return [self._read(rank) for rank in range(len(self._processes))]

    def _read(self, rank: int) -> dict:
        stdout = self._processes[rank].stdout
        assert stdout is not None, "started with pipes"
        line = stdout.readline()
        if not line:
            raise self._failure(rank)
        return json.loads(line)

    def _failure(self, rank: int) -> PeerFailed:
        code = self._processes[rank].wait()
        lines = self._errors_of(rank).read_text(errors="replace").strip().splitlines() or ["printed nothing"]
        self.close()
        return PeerFailed(f"{self.peer.name}: rank {rank} ended with code {code}: {lines[-1].strip()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
