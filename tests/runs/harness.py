"""Whole runs of pretrain_gpt.py, three ways: in this process, on the ranks of the pool, and in processes that may die.

All three go through the script's own `run_main(main)`, so exit codes, messages and files are those a user gets.
Starting a process that has imported everything costs seconds; a `Launcher` does it once and forks the ranks of its
jobs, without torchrun, so that the exit code of each rank can be seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron3d.comm.meter import Meter
from megatron3d.comm.waiting import Waiting
from megatron3d.data.indexed import IndexedDatasetWriter
from megatron3d.offload.block_file import BlockFile
from megatron3d.train import joining, launch, loop
from megatron3d.train.signals import STOP_SIGNALS
from tests.dist.pool import start_process

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "pretrain_gpt.py"
VOCAB_SIZE = 101
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 "
    f"--global-batch-size 8 --train-iters 6 --lr 3e-3 --vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 4 "
    "--hidden-dropout 0 --attention-dropout 0 --log-interval 1 --eval-iters 0 --device cpu --num-workers 0 "
    "--lr-decay-style constant"
)
MOCK = f"{TINY} --mock-data"
LOG_TIME = re.compile(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\] ")


def words(*options: str | Path) -> list[str]:
    """A command line: strings are split at spaces, paths are one word each."""
    return [word for option in options for word in ([str(option)] if isinstance(option, Path) else option.split())]


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (None for a normal return, which Python turns into 0) and what it said."""

    code: int
    out: str
    err: str

    @property
    def log(self) -> list[str]:
        """The lines of standard output without the time that a line of the log begins with."""
        return [LOG_TIME.sub("", line) for line in self.out.splitlines()]

    def says(self, *fragments: str) -> None:
        """Fail unless standard error holds every fragment; line breaks count as spaces."""
        text = " ".join(self.err.split())
        missing = [fragment for fragment in fragments if fragment not in text]
        assert not missing, f"{missing} not in:\n{self.err}"


class _EndedEarly(BaseException):
    """Stands for the end of the process, which a test must outlive."""


def run(argv: Sequence[str], *, rank: int = 0, world_size: int = 1, script: Path = SCRIPT) -> Ended:
    """A training script as one rank in this process; with more ranks torch.distributed must be initialised already."""
    codes = [0]

    def end_process(code: int) -> None:
        codes.append(code)
        raise _EndedEarly

    place = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    out, err = io.StringIO(), io.StringIO()
    with (
        _signal_handlers_kept(),
        mock.patch.dict(os.environ, place),
        mock.patch.object(sys, "argv", [script.name, *argv]),
        mock.patch.object(launch, "end_process", end_process),
        mock.patch.object(joining, "join", lambda *_, **__: None),
        mock.patch.object(joining, "leave", lambda: None),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.suppress(_EndedEarly),
    ):
        runpy.run_path(str(script), run_name="__main__")
    return Ended(codes[-1], out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """A run that was stopped ignores the signals that stop it until its process ends; a test's process lives on."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_ok(*options: str | Path) -> Ended:
    """`run` of a command line in one process that must end well."""
    ended = run(words(*options))
    assert ended.code == 0, ended.err
    return ended


def on_rank(rank: int, world_size: int, argv: Sequence[str], script: Path = SCRIPT) -> Ended:
    """Body for `pool.run`: the script as this rank of the pool's process group."""
    return run(argv, rank=rank, world_size=world_size, script=script)


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[dict[str, Any]]:
    """The records of training steps, in file order."""
    return [record for record in records(path) if "loss" in record]


def losses(path: Path) -> list[float]:
    """Loss of each step; fails unless the steps are 1, 2, 3 ... without gap or repetition."""
    found = steps(path)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1)), [r["step"] for r in found]
    return [record["loss"] for record in found]


def exit_status(save: Path) -> dict[str, Any]:
    """exit_status.json beside the checkpoints."""
    return json.loads((save / "exit_status.json").read_text())


def write_tokens(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    """A token file of these documents."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(list(document))
    return prefix


def random_documents(seed: int, *, count: int = 40, length: int = 60, low: int = 0) -> list[list[int]]:
    """Documents of random ids in the vocabulary, each ended by the id 0."""
    generator = np.random.default_rng(seed)
    return [[*generator.integers(max(1, low), VOCAB_SIZE, size=length).tolist(), 0] for _ in range(count)]


# --- Processes that may die -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What goes wrong on a rank instead of its step number `step` (from 1): "kill", "hang" or "raise", or
    "stuck" in C as in a wait of NCCL's; or, in that step, "kill-writing" when some of its offloaded state is written
    back and some is not.

    Or a SIGTERM arrives: "stop-evaluating" before the second batch of evaluation number `step`, "stop-starting"
    before the checkpoint is looked for.
    """

    rank: int
    step: int
    kind: str


@dataclass(frozen=True)
class _Order:
    """One rank for the launcher to start."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    output: str
    fault: tuple[int, str] | None


@dataclass(frozen=True)
class _HasEnded:
    """The question to the launcher whether a process is over."""

    pid: int


@dataclass
class Job:
    """The processes of one run."""

    launcher: Launcher
    pids: list[int]
    outputs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def wait(self, *ranks: int, timeout_s: float = 120.0) -> list[int]:
        """Exit codes of some ranks (default: all), minus the signal for a killed one; fails if one still runs then."""
        deadline = time.monotonic() + timeout_s
        ranks = ranks or tuple(range(len(self.pids)))
        for rank in ranks:
            if rank not in self.codes:
                code = self.launcher.wait(self.pids[rank], max(0.0, deadline - time.monotonic()))
                assert code is not None, f"rank {rank} still runs after {timeout_s} s; it said:\n{self.said(rank)}"
                self.codes[rank] = code
        return [self.codes[rank] for rank in ranks]

    def wait_for_step(self, metrics: Path, step: int, *, timeout_s: float = 120.0) -> None:
        """Return once the metrics file has this step."""
        deadline = time.monotonic() + timeout_s
        while not metrics.exists() or metrics.read_text().count('"loss"') < step:
            assert time.monotonic() < deadline, f"no step {step} after {timeout_s} s; rank 0 said:\n{self.said(0)}"
            time.sleep(0.01)

    def said(self, rank: int) -> str:
        """Standard output and error of a rank so far."""
        return self.outputs[rank].read_text()

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks (default: all)."""
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """End what still runs."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
                self.launcher.wait(pid, 10.0)


class Launcher:
    """A process that has imported everything and forks the ranks of jobs; one for a test session."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._connection, theirs = multiprocessing.Pipe()
        self._process = start_process(_serve, theirs)
        theirs.close()

    @contextlib.contextmanager
    def job(self, argv: Sequence[str], world_size: int = 1, *, fault: Fault | None = None) -> Iterator[Job]:
        """Start a run; whatever still runs at the end of the block is killed."""
        port = _free_port()
        job = Job(self, [], [])
        try:
            for rank in range(world_size):
                self._count += 1
                output = self._folder / f"rank{rank}-{self._count}.txt"
                environment = {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "GLOO_SOCKET_IFNAME": "lo",
                }
                mine = (fault.step, fault.kind) if fault and fault.rank == rank else None
                job.pids.append(self._ask(_Order(tuple(argv), environment, str(output), mine)))
                job.outputs.append(output)
            yield job
        finally:
            job.kill()

    def wait(self, pid: int, timeout_s: float) -> int | None:
        """Exit code of a forked process, None if it still runs then."""
        return self._ask((pid, timeout_s))

    def has_ended(self, pid: int) -> bool:
        """Whether a forked process is over; its exit code is still there for `wait`."""
        return self._ask(_HasEnded(pid))

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(10)

    def _ask(self, request: Any) -> Any:
        self._connection.send(request)
        return self._connection.recv()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _serve(connection: Connection) -> None:
    """The launcher's process: fork for an `_Order`, wait for a (pid, timeout)."""
    gc.freeze()  # What imports made stays: no rank looks through it, which would also copy its pages.
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            if isinstance(request, _Order):
                pid = os.fork()
                if pid == 0:
                    _be_rank(request)
                connection.send(pid)
            elif isinstance(request, _HasEnded):
                options = os.WEXITED | os.WNOHANG | os.WNOWAIT
                connection.send(os.waitid(os.P_PID, request.pid, options) is not None)
            else:
                connection.send(_exit_code(*request))


def _exit_code(pid: int, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.01)


def _be_rank(order: _Order) -> None:
    """The forked process: become a rank and never return."""
    code = 1
    try:
        output = os.open(order.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(order.environment)
        torch.set_num_threads(1)
        sys.argv = [SCRIPT.name, *order.argv]
        if order.fault is not None and order.fault[1] == "stop-evaluating":
            loop.evaluate = _stopped_within(loop.evaluate, order.fault[0])
        elif order.fault is not None and order.fault[1] == "stop-starting":
            loop.state.restore = _stopped_before(loop.state.restore)
        elif order.fault is not None:
            loop.train_step = _faulty(loop.train_step, *order.fault)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        code = 0
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT  # as Python ends where nothing handles it
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _faulty(train_step: Callable[..., Any], at_step: int, kind: str) -> Callable[..., Any]:
    def step_or_fail(*args: Any, step: int, **kwargs: Any) -> Any:
        if step + 1 == at_step:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "kill-writing":
                BlockFile.write = _write_once_and_die(BlockFile.write)
                return train_step(*args, step=step, **kwargs)
            if kind == "hang":
                time.sleep(3600)
            if kind == "stuck":
                _get_stuck(args[0].mesh.meter)
            raise RuntimeError("a fault was injected here")
        return train_step(*args, step=step, **kwargs)

    return step_or_fail


def _get_stuck(meter: Meter) -> None:
    """What NCCL does when another rank is lost: its wait returns at once, as the device waits, and the main thread
    stops in C where it reads a value back."""
    meter.mark = lambda: lambda: False  # a moment that does not come
    with Waiting("all_reduce", "batch", (0, 1), meter):
        pass
    ctypes.CDLL(None).sleep(3600)


def _stopped_before(function: Callable[..., Any]) -> Callable[..., Any]:
    def stopped(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # a thread reads the signal
        return function(*args, **kwargs)

    return stopped


def _stopped_within(evaluate: Callable[..., Any], number: int) -> Callable[..., Any]:
    evaluations = []

    def stopped(*args: Any, before_batch: Callable[[], None], **kwargs: Any) -> Any:
        evaluations.append(0)

        def before_each() -> None:
            evaluations[-1] += 1
            if len(evaluations) == number and evaluations[-1] == 2:
                _stopped_before(before_batch)()
            else:
                before_batch()

        return evaluate(*args, before_batch=before_each, **kwargs)

    return stopped


def _write_once_and_die(write: Callable[..., None]) -> Callable[..., None]:
    written = []

    def write_or_die(*args: Any, **kwargs: Any) -> None:
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(True)
        write(*args, **kwargs)

    return write_or_die
