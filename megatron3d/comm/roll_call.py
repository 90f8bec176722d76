"""A roll call after a collective that timed out: which ranks answer, what each does, and so which one is missing.

A rank that is stopped, swapped out or gone does not answer; one that hangs in Python or in a file system does, from a
thread beside the hanging one, and says where it is. The first rank whose wait ends calls; all answer through the store
at which the job met, and write their stacks to standard error.

The store is hosted by the elastic agent, or without one by rank 0; if that is the silent one nobody can answer, and the
report says so.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megatron3d.comm.meter import Meter

POLL_S = 1.0
ANSWER_S = 5.0  # a few polls, as a busy process may be late; other ranks time out at their own moments meanwhile
STORE_S = 5.0  # for the store to speak at all
LEAVE_S = 10.0
_STDERR = 2
_CALL, _LEFT = "call", "left"


@dataclass(frozen=True)
class Answer:
    """What a rank is doing: the collective it waits for, None if it is in none, and the line of our code it is at."""

    waiting_for: str | None
    at: str


_PACKAGE = __name__.partition(".")[0]


class RollCall:
    """One rank's part in roll calls: it answers from a thread as soon as it exists, and can call itself."""

    def __init__(self, store: dist.Store, *, rank: int, world_size: int) -> None:
        """`store` is the one at which the ranks met; a connection of its own is made to it."""
        clone = store.clone()  # pyright: ignore[reportAttributeAccessIssue] torch's stub leaves it out
        self._store = dist.PrefixStore("roll-call", clone)
        self._rank, self._world_size = rank, world_size
        self._meter: Meter | None = None
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="roll-call", daemon=True)
        self._thread.start()

    def watch(self, meter: Meter) -> None:
        """Answer with what this meter says that the rank waits for."""
        self._meter = meter

    def call(self) -> dict[int, Answer] | None:
        """Ask all ranks and return the answers that came, by rank; None if the store itself is silent."""
        answers: dict[int, Answer] = {}
        heard = threading.Event()

        def ask() -> None:
            with contextlib.suppress(dist.DistNetworkError, dist.DistStoreError):  # gone: as silent as stopped
                self._answer()
                self._store.set(_CALL, str(self._rank))
                deadline = time.monotonic() + ANSWER_S
                while len(answers) < self._world_size and time.monotonic() < deadline:
                    for rank in range(self._world_size):
                        if rank not in answers and self._store.check([f"answer/{rank}"]):
                            answers[rank] = Answer(**json.loads(self._store.get(f"answer/{rank}")))
                    heard.set()
                    time.sleep(0.1)

        # The store's client has no timeout for a host that does not answer, so another thread waits for it.
        asking = threading.Thread(target=ask, name="roll-call-asking", daemon=True)
        asking.start()
        asking.join(ANSWER_S + STORE_S)
        return dict(answers) if heard.is_set() else None

    def close(self) -> None:
        """Stop answering. The host of the store stays until all have stopped, or their connections would break."""
        self._over.set()
        self._thread.join(2 * POLL_S)
        with contextlib.suppress(dist.DistNetworkError, dist.DistStoreError):  # another rank has ended otherwise
            left, deadline = self._store.add(_LEFT, 1), time.monotonic() + LEAVE_S
            while self._rank == 0 and left < self._world_size and time.monotonic() < deadline:
                time.sleep(0.01)
                left = self._store.add(_LEFT, 0)

    def _listen(self) -> None:
        with contextlib.suppress(dist.DistNetworkError, dist.DistStoreError):  # the job is at its end
            while not self._over.wait(POLL_S):
                if self._store.check([_CALL]):
                    self._answer()
                    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
                    return

    def _answer(self) -> None:
        wait = self._meter.oldest_wait() if self._meter is not None else None
        answer = {
            "waiting_for": None if wait is None else str(wait),
            "at": self._line_of_main_thread(),
        }
        self._store.set(f"answer/{self._rank}", json.dumps(answer))

    def _line_of_main_thread(self) -> str:
        """Where the main thread is: its innermost line, and the innermost of this project if that is another."""
        innermost = frame = sys._current_frames().get(self._main or 0)
        while frame is not None and _PACKAGE not in Path(frame.f_code.co_filename).parts:
            frame = frame.f_back
        return " in ".join(dict.fromkeys(_place(one) for one in (innermost, frame) if one is not None))


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"


def report(answers: dict[int, Answer] | None, world_size: int) -> str:
    """Who is missing and what the others do, as sentences."""
    if answers is None:
        return (
            "a roll call got no answer from the store, which rank 0 hosts unless an elastic agent does: look at the "
            "machine of rank 0, whether its process is stopped, swapped out or gone"
        )
    missing = [rank for rank in range(world_size) if rank not in answers]
    elsewhere = {rank: answer for rank, answer in sorted(answers.items()) if answer.waiting_for is None}
    if missing:
        many = len(missing) > 1
        names = f"rank{'s' * many} {', '.join(map(str, missing))}"
        return (
            f"{names} did not answer a roll call, and {len(answers)} of {world_size} ranks did: look at the "
            f"machine{'s' * many} of {names}, whether the process is stopped, swapped out, stuck in a driver or gone"
        )
    if elsewhere:
        hanging = "; ".join(f"rank {rank} is at {answer.at}" for rank, answer in elsewhere.items())
        return f"all {world_size} ranks answer a roll call, but not all are in a collective: {hanging}"
    waits = "; ".join(f"rank {rank} waits in {answer.waiting_for}" for rank, answer in sorted(answers.items()))
    return f"all {world_size} ranks answer a roll call and wait for each other: {waits}"
