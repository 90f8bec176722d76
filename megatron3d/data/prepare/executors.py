"""Where the batches of a corpus are encoded: in this process, in others of this machine, or by a Ray cluster.

An executor applies a pure function to items and gives the results in the order of the items, so what is written does
not depend on which one it is or on how many workers it has. A bounded number of items is under way, so memory does not
grow with the corpus. Signals are the parent's to handle: it ends the workers when it is asked to stop, and they end by
themselves when it is killed.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, ClassVar, Protocol, TypeVar

from megatron3d.data.prepare.array_messages import receive_answer, send_answer
from megatron3d.errors import ConfigError, Megatron3dError, PeerError, install_extra
from megatron3d.process.parent import watch_parent

EXECUTORS = ("processes", "ray")
_BATCHES_PER_WORKER = 4
_CONNECT_S = 20
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Executor(Protocol):
    """Applies a function to items, somewhere; `sees_files` says whether under the paths that this process knows."""

    sees_files: ClassVar[bool]

    def map_in_order(self, work: Callable[[_In], _Out], items: Iterable[_In]) -> Generator[_Out, None, None]:
        """`work` of each item, in the order of the items; closing the generator ends the workers.

        Raises: what `work` raised for the first item that failed; PeerError if a worker was lost.
        """
        ...


@dataclass(frozen=True)
class Processes:
    """`workers` processes of this machine; with one worker this process itself."""

    sees_files: ClassVar[bool] = True
    workers: int = 1

    def map_in_order(self, work: Callable[[_In], _Out], items: Iterable[_In]) -> Generator[_Out, None, None]:
        """As the protocol says."""
        if self.workers <= 1:
            yield from map(work, items)
            return
        workers, idle = [], SimpleQueue[_Worker]()

        def encode(item: _In) -> _Out:
            worker = idle.get()
            try:
                is_result, value = worker.apply(item)
            except (EOFError, OSError) as error:
                raise PeerError(
                    f"One of the {self.workers} workers was killed, most likely for want of memory; use fewer "
                    f"--workers or cut very long documents."
                ) from error
            finally:
                idle.put(worker)
            if not is_result:
                raise value
            return value

        threads = ThreadPoolExecutor(self.workers)
        try:
            for _ in range(self.workers):
                workers.append(_Worker(work))
                idle.put(workers[-1])
            yield from _windowed(lambda item: threads.submit(encode, item).result, items, self.workers)
        finally:
            for worker in workers:
                worker.kill()
            threads.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """A process that applies `work` to what is sent to it, over a connection of its own.

    A thread of the parent waits for each. The pool of `concurrent.futures` has one pipe for the results of all workers:
    where one is killed while it writes, the reader waits for the rest of that result for ever.
    """

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        words = (work, theirs, self._connection, os.getpid())
        self._process = multiprocessing.Process(target=_serve, args=words, daemon=True)
        self._process.start()
        theirs.close()  # so that the connection ends with the process

    def apply(self, item: Any) -> tuple[bool, Any]:
        """True and `work(item)`, or False and what it raised. Raises: EOFError or OSError if the process is gone."""
        self._connection.send(item)
        return receive_answer(self._connection)

    def kill(self) -> None:
        """End the process: what it works at is pure, and nobody waits for it any more."""
        self._process.kill()
        self._process.join()


def _serve(work: Callable[[Any], Any], connection: Connection, of_parent: Connection, parent_pid: int) -> None:
    """The body of a worker. Signals of the whole group (Ctrl-C, a scheduler's SIGTERM) are left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    of_parent.close()
    watch_parent(parent_pid, lambda: os._exit(1))
    with suppress(EOFError, OSError):  # the parent is gone, or done
        while True:
            send_answer(connection, *_answer(work, connection.recv()))


def _answer(work: Callable[[Any], Any], item: Any) -> tuple[bool, Any]:
    """True and the result, or False and the error, with its traceback, which does not travel by itself, as a note."""
    try:
        return True, work(item)
    except Exception as error:
        if not isinstance(error, Megatron3dError):
            error.add_note(traceback.format_exc())
        return False, error


@dataclass(frozen=True)
class Ray:
    """Tasks of Ray: on a cluster that runs at `address`, or on one that is started here with `workers` cores.

    A batch whose worker is lost is encoded again by another one, as Ray does with tasks. The nodes of a cluster need
    this package and the tokenizer's files under the same paths; the text is sent to them.
    """

    sees_files: ClassVar[bool] = False
    workers: int = 1
    address: str | None = None

    def map_in_order(self, work: Callable[[_In], _Out], items: Iterable[_In]) -> Generator[_Out, None, None]:
        """As the protocol says. Raises: ConfigError if Ray is not installed or there is no cluster at the address."""
        with _connected(self) as ray:
            # plain wrappers: Ray names a task by its function, which a functools.partial is not
            task, shared_work = ray.remote(num_cpus=1)(_apply), ray.put(work)

            def submit(item: _In) -> Callable[[], _Out]:
                reference = task.remote(shared_work, item)
                return lambda: ray.get(reference)

            try:
                yield from _windowed(submit, items, self.workers)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, Megatron3dError):
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                reason = str(error).splitlines()[0]
                raise PeerError(f"Ray lost a batch ({reason}); see the logs of its nodes.") from error


def _windowed(submit: Callable[[_In], Callable[[], _Out]], items: Iterable[_In], workers: int) -> Iterator[_Out]:
    """The results of items in order, where at most `_BATCHES_PER_WORKER` for each worker are under way."""
    pending: deque[Callable[[], _Out]] = deque()
    for item in items:
        pending.append(submit(item))
        if len(pending) >= workers * _BATCHES_PER_WORKER:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


@contextmanager
def _connected(executor: Ray) -> Iterator[Any]:
    """The module `ray`, connected; what was started for it ends with the block."""
    if executor.address is not None:
        _require_answer(executor.address)
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"--executor ray: ray is not installed; run: {install_extra('ray')}") from error
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    if executor.address is None:
        options |= {"address": "local", "num_cpus": executor.workers}
    else:
        options = {"address": executor.address, "log_to_driver": False, "logging_level": "ERROR"}
    with _own_sigterm():
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"--ray-address {executor.address}" if executor.address else "a local Ray"
            raise ConfigError(f"--executor ray: {where} cannot be reached ({error}).") from error
    try:
        yield ray
    finally:
        with _own_sigterm():
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself asks an address at which nobody answers for a quarter of an hour.

    Raises: ConfigError if `address` is HOST:PORT and refuses a connection.
    """
    if (match := re.fullmatch(r"(.+):([0-9]{1,5})", address)) is None or "://" in address:
        return
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--executor ray: --ray-address {address} cannot be reached ({error}).") from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _apply(work: Callable[[_In], _Out], item: _In) -> _Out:
    """The body of a task of Ray."""
    return work(item)
