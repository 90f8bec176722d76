"""What one worker process of the pool does: wait for a body, run it as one rank of a fresh process group, answer.

The protocol over the worker's pipe, all messages pickled by value (torch's sharing of tensor memory between processes
would tie a result to the life of the worker):

    pool -> worker   Task            run this body as rank r of n
    worker -> pool   Answer          its result, or its traceback as text
    pool -> worker   FINISH          every rank has answered: the group may be taken down
    worker -> pool   FINISHED        done; the next Task may come

The group stays up until FINISH because a rank that closes its connections early makes the others' last collective fail.
"""

from __future__ import annotations

import faulthandler
import gc
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

FINISH = b"finish"
FINISHED = b"finished"


@dataclass(frozen=True)
class Task:
    """One rank's part of one call; `body` is a pickled (function, args, kwargs), opened only by the worker."""

    number: int
    rank: int
    world_size: int
    collective_timeout_s: float
    sys_path: tuple[str, ...]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What became of a task: the result, or the text of the traceback if it raised."""

    result: Any = None
    error: str | None = None


def serve(connection: Connection, store_port: int, stack_file: str) -> None:
    """Answer tasks until the pool closes its end of the pipe; SIGUSR2 writes all stacks to `stack_file`.

    No test may use that signal for anything else in a worker; training takes SIGUSR1 and puts back Python's handler,
    not one of the C library.
    """
    torch.set_num_threads(1)
    gc.freeze()  # What torch's import made stays; looking through it again would cost 50 ms a body.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's to handle: it takes the workers down.
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        print("SIGUSR2 writes the stacks below", file=stacks, flush=True)
        store = dist.TCPStore("127.0.0.1", store_port, is_master=False, timeout=timedelta(seconds=60))
        try:
            while True:
                _serve_one(connection, pickle.loads(connection.recv_bytes()), store)
        except (EOFError, ConnectionError):
            return  # The pool is gone.


def _serve_one(connection: Connection, task: Task, store: dist.Store) -> None:
    connection.send_bytes(_pickled(_run(task, store)))
    if connection.recv_bytes() != FINISH:
        raise EOFError
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    connection.send_bytes(FINISHED)


def _run(task: Task, store: dist.Store) -> Answer:
    """Run the body; whatever it raises, SystemExit included, becomes a traceback for the pool to show."""
    try:
        sys.path[:] = task.sys_path
        torch.manual_seed(0)  # Kept workers must not let one body's random state reach the next.
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"call{task.number}", store),
            rank=task.rank,
            world_size=task.world_size,
            timeout=timedelta(seconds=task.collective_timeout_s),
        )
        function: Callable[..., Any]
        function, args, kwargs = pickle.loads(task.body)
        return Answer(result=function(task.rank, task.world_size, *args, **kwargs))
    except BaseException:
        return Answer(error=traceback.format_exc())


def _pickled(answer: Answer) -> bytes:
    try:
        return pickle.dumps(answer)
    except Exception as error:
        return pickle.dumps(Answer(error=f"the result cannot be sent back, it cannot be pickled: {error}"))
