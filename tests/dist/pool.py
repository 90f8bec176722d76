"""One pool of gloo worker processes for a whole test session: multi-process tests for 0.02 s each instead of seconds.

`pool.run(world_size, body, ...)` runs a module-level function on every rank with torch.distributed initialised and
returns the results by rank. Processes are started when first needed, from a fork server that has torch already
imported, and kept. A rank that raises, dies or hangs ends the call with an error that names it and shows its traceback
or stack; all processes are then killed, and new ones start when next needed. `worker.py` is the other half.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.dist import worker

MAX_WORLD_SIZE = 8
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # Eight ranks on two cores: more threads only get in each other's way.
    "GLOO_SOCKET_IFNAME": "lo",  # A machine whose own name does not resolve still has a loopback device.
}
# Imported once, before workers are forked: what a run imports late is here too. torch imports torch._dynamo, which
# takes a second, with a process's first optimizer.
WORKER_IMPORTS = (
    "torch",
    "torch._dynamo",
    "megatron3d.checkpoint.store",
    "megatron3d.pipeline.draw.measured",
    "megatron3d.train.loop",
    "megatron3d.train.settle",
    "pytest",
)
GRACE_S = 0.1  # How long the other ranks get, after one has failed, to say that they failed too.
FINISH_TIMEOUT_S = 30.0
STACK_TIMEOUT_S = 30.0
# A thread's stack, innermost frame first, down to the worker's own frame, which only the main thread has.
_STACK = re.compile(rf'^[^\n]*thread 0x.*\n(?:  File .*\n)*?(?=  File "{re.escape(worker.__file__)}")', re.M | re.I)


class RankError(AssertionError):
    """A body failed on some rank: it raised, its process died, or it ran out of time. The text says who and where."""


def start_process(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Start a daemon process that calls a module-level function: a fork of the one server, which has the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*WORKER_IMPORTS])
    process = context.Process(target=function, args=args, daemon=True)
    with _environment(WORKER_ENVIRONMENT):  # The server, started by the first process, keeps it for all.
        process.start()
    return process


@dataclass
class _Worker:
    process: ForkServerProcess
    connection: Connection
    stack_file: Path

    def stack(self) -> str:
        """Where the process's main thread is now, as Python sees it, or why that is not known."""
        deadline = time.monotonic() + STACK_TIMEOUT_S
        while time.monotonic() < deadline:
            # The file has its first line once the handler stands. The system may have any thread handle the signal, and
            # one that is not Python's writes nothing of its own, so all threads are written and the signal is repeated.
            text = self.stack_file.read_text() if self.stack_file.exists() else ""
            if found := _STACK.search(text):
                return found[0].rstrip()
            if text:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.process.pid, signal.SIGUSR2)
            time.sleep(0.05)
        return f"(it gave no stack within {STACK_TIMEOUT_S:g} s)"

    def kill(self) -> None:
        """End the process now, whatever it is doing."""
        self.process.kill()
        self.process.join(10)
        self.connection.close()


class Pool:
    """The kept workers. Not thread-safe: one call at a time."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._store: dist.TCPStore | None = None
        self._calls = 0
        self._started = 0
        self._folder = tempfile.TemporaryDirectory(prefix="megatron3d-pool-")

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240, **kwargs: Any
    ) -> list[Any]:
        """Call `function(rank, world_size, *args, **kwargs)` on every rank and return the results in rank order.

        `function` must be importable (module level) and its arguments and results picklable. A gloo process group of
        exactly these ranks is the default group while it runs; collectives give up shortly before `timeout_s`, and
        torch's random seed is 0 on every rank.

        Raises:
            ValueError: a world size outside 1..8.
            RankError: a rank raised, died or had not answered after `timeout_s`.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size {world_size} is outside 1..{MAX_WORLD_SIZE}, the sizes this pool serves")
        body = pickle.dumps((function, args, kwargs))
        deadline = time.monotonic() + timeout_s
        try:
            self._start(world_size)
            self._calls += 1
            for rank in range(world_size):
                task = worker.Task(self._calls, rank, world_size, 0.8 * timeout_s, tuple(sys.path), body)
                self._send(rank, pickle.dumps(task))
            answers = self._gather(world_size, deadline, timeout_s)
            self._finish(world_size)
        except BaseException:  # Also Ctrl-C and pytest-timeout: no rank may go on running a body nobody waits for.
            self.close_workers()
            raise
        return [answers[rank].result for rank in range(world_size)]

    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive now, by rank."""
        return [w.process.pid for w in self._workers]

    def close_workers(self) -> None:
        """Kill every worker; the next call starts new ones."""
        for each in self._workers:
            each.kill()
        self._workers.clear()

    def close(self) -> None:
        """End the pool: its workers and its files."""
        self.close_workers()
        self._store = None
        self._folder.cleanup()

    def _start(self, world_size: int) -> None:
        for rank, each in enumerate(self._workers):
            if not each.process.is_alive():  # Killed between two calls, by hand or by the system.
                each.kill()
                self._workers[rank] = self._start_worker()
        while len(self._workers) < world_size:
            self._workers.append(self._start_worker())

    def _start_worker(self) -> _Worker:
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._started += 1
        stack_file = Path(self._folder.name) / f"stack{self._started}.txt"
        ours, theirs = multiprocessing.Pipe()
        process = start_process(worker.serve, theirs, self._store.port, str(stack_file))
        theirs.close()
        return _Worker(process, ours, stack_file)

    def _send(self, rank: int, message: bytes) -> None:
        try:
            self._workers[rank].connection.send_bytes(message)
        except OSError as error:
            raise RankError(self._death(rank)) from error

    def _gather(self, world_size: int, deadline: float, timeout_s: float) -> dict[int, worker.Answer]:
        answers: dict[int, worker.Answer] = {}
        while len(answers) < world_size:
            news = self._receive(set(range(world_size)) - set(answers), deadline)
            if not news:
                late = sorted(set(range(world_size)) - set(answers))
                text = f"{_ranks(late)} of {world_size} had not answered after timeout_s={timeout_s:g}"
                raise RankError("\n\n".join([text, *self._stacks(late)]))
            if any(isinstance(item, str) or item.error for item in news.values()):
                raise RankError(self._failures(world_size, answers, news))
            answers.update(news)
        return answers

    def _receive(self, ranks: set[int], deadline: float) -> dict[int, Any]:
        """Whatever the ranks have to say next: an Answer or, for a dead process, a sentence. Empty at the deadline."""
        by_connection = {self._workers[rank].connection: rank for rank in ranks}
        news: dict[int, Any] = {}
        for connection in wait(list(by_connection), max(0.0, deadline - time.monotonic())):
            rank = by_connection[connection]
            try:
                news[rank] = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                news[rank] = self._death(rank)
        return news

    def _failures(self, world_size: int, answered: dict[int, worker.Answer], news: dict[int, Any]) -> str:
        """The text of a failure: what failed first, what failed within the grace, and where everyone else is."""
        seen = dict(news)
        grace_ends = time.monotonic() + GRACE_S
        while more := self._receive(set(range(world_size)) - set(answered) - set(seen), grace_ends):
            seen.update(more)
        silent = sorted(set(range(world_size)) - set(answered) - set(seen))
        failures = [_failure(rank, world_size, item) for rank, item in seen.items()]
        return "\n\n".join(["", *filter(None, failures), *self._stacks(silent)])

    def _stacks(self, ranks: list[int]) -> list[str]:
        return [f"rank {rank} was still running:\n{self._workers[rank].stack()}" for rank in ranks]

    def _death(self, rank: int) -> str:
        process = self._workers[rank].process
        process.join(10)
        code = process.exitcode
        if code is not None and code < 0:
            return f"rank {rank} died: its process {process.pid} was ended by {signal.Signals(-code).name}"
        return f"rank {rank} died: its process {process.pid} ended with exit code {code}"

    def _finish(self, world_size: int) -> None:
        for rank in range(world_size):
            self._send(rank, worker.FINISH)
        for rank in range(world_size):
            connection = self._workers[rank].connection
            try:
                if not connection.poll(FINISH_TIMEOUT_S) or connection.recv_bytes() != worker.FINISHED:
                    stack = self._workers[rank].stack()
                    raise RankError(
                        f"rank {rank} did not take its process group down in {FINISH_TIMEOUT_S} s:\n{stack}"
                    )
            except (EOFError, ConnectionError) as error:
                raise RankError(self._death(rank)) from error


def _failure(rank: int, world_size: int, news: worker.Answer | str) -> str:
    if isinstance(news, str):
        return news
    return f"rank {rank} of {world_size} raised:\n{news.error.rstrip()}" if news.error else ""


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
