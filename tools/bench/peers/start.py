"""Starts the processes of a peer and asks them for steps, so that peers can take turns and a crash ends only its own.

Each rank is a process with a pipe of its own and the variables that every framework reads to find its rank. While
another peer has its turn, they wait for the next line and use no processor. Each leads a process group, which is ended
as a whole: nothing that a peer has started stays behind, also when it hangs or the benchmark is interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from tools.bench.peers.work import Peer, Work
from tools.bench.rounds import TurnFailed

ENDING_S = 10.0  # a process that has closed its pipe is given this long to end


class PeerFailed(TurnFailed):
    """A process of a peer ended or gave no answer in time; the message has the last line that it printed."""


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
        self._name, self._timeout_s = name, work.timeout_s
        self._killed: list[int] = []
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
            PeerFailed: the process ended, or printed nothing for as long as the work allows.
        """
        stdout = self._processes[rank].stdout
        assert stdout is not None, "started with pipes"
        timer = threading.Timer(self._timeout_s, self._kill_running)
        timer.start()
        try:
            line = stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise self._failure(rank)
        return line

    def close(self) -> None:
        """End the processes and all that they have started."""
        for process in self._processes:
            _kill_group(process)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None, "started with pipes"
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._processes = []
        self._directory.cleanup()

    def _kill_running(self) -> None:
        """After the time is over; a rank that has ended by itself is not counted, it is why the others wait."""
        self._killed = [rank for rank, process in enumerate(self._processes) if process.poll() is None]
        for process in self._processes:
            _kill_group(process)

    def _start(self, command: list[str], work: Work, rank: int, port: int) -> subprocess.Popen[str]:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": work.ranks, "LOCAL_WORLD_SIZE": work.ranks}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": work.threads}
        environment = os.environ | {name: str(value) for name, value in (ranks | meeting).items()}
        pipe = subprocess.PIPE
        with self._errors_of(rank).open("w") as errors:
            return subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment, start_new_session=True
            )

    def _errors_of(self, rank: int) -> Path:
        return Path(self._directory.name) / f"errors_{rank}.txt"

    def _failure(self, rank: int) -> PeerFailed:
        process = self._processes[rank]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_S)
        if self._killed:
            rank = next((other for other in range(len(self._processes)) if other not in self._killed), rank)
        ended = f"ended with code {self._processes[rank].poll()}"
        what = f"gave no answer in {self._timeout_s:g} s and was killed" if rank in self._killed else ended
        lines = self._errors_of(rank).read_text(errors="replace").strip().splitlines() or ["printed nothing"]
        self.close()
        return PeerFailed(f"{self._name}: rank {rank} {what}: {lines[-1].strip()}")


class RunningPeer:
    """The processes of one peer, ready for steps."""

    def __init__(self, peer: Peer, work: Work) -> None:
        """Start them and wait for their first step.

        Raises:
            PeerFailed: one of them ended, or gave no answer in time.
        """
        command = [sys.executable, "-m", "tools.bench.peers.serve", peer.module, work.to_json()]
        self._processes = RankProcesses(peer.name, command, work)
        self._ranks = range(work.ranks)
        try:
            self.num_parameters: int = sum(ready["parameters"] for ready in self._answers())
        except BaseException:  # an interrupt too: nobody has this object yet who could close it
            self.close()
            raise

    def run_steps(self, count: int) -> Turn:
        """Make this many steps on every rank.

        Raises:
            PeerFailed: a process ended, or gave no answer in time.
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


def exit_when_terminated() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that the peers are closed on the way."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
