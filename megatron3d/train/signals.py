"""Stopping on request: a signal becomes a flag that the loop looks at between steps.

SIGTERM and SIGINT ask the run to save and stop. SIGUSR1 asks the same; cluster schedulers send it some time before the
limit of a job. So does SIGHUP, which comes when a terminal closes, unless the process was started with it ignored, as
`nohup` does. If the run hangs and a person insists, a second SIGTERM or SIGINT ends the process at once with the usual
143 or 130. Before a run has joined its job nothing looks at the flag, and there is nothing to save: a stop then ends
the process (`on_early`). Three things make this work in practice:

- a signal is often delivered twice, by the scheduler to every process and by the launcher to its workers: repeats
  within `relay_window_s` count as one;
- SIGUSR1 and SIGHUP never force, so the SIGTERM that follows at the limit does not kill the save they started;
- Python runs its handlers only between bytecodes of the main thread, which may be stuck in a collective. The signal
  number is therefore written to a socket by the C level, and a thread reads it there.

Each process has a flag of its own, and signals do not reach all at the same step: the loop combines the flags of all
ranks with one reduction and stops everywhere after the same step.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from megatron3d.errors import StopRequested

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FORCING_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """A context manager within which the stop signals set a flag; afterwards the earlier handlers are back."""

    def __init__(
        self,
        *,
        relay_window_s: float = 2.0,
        on_forced: Callable[[int], None] | None = None,
        on_early: Callable[[str], None] | None = None,
    ) -> None:
        """Set up a flag that no signal sets yet.

        Args:
            relay_window_s: signals within this time after the first are taken for repeats of it.
            on_forced: called with the exit code before a forced exit, to record it; it must be quick.
            on_early: called with the reason of a stop before `defer`, in any thread, and ends the process. Without it
                a stop is deferred from the start.
        """
        self._relay_window_s = relay_window_s
        self._on_forced, self._on_early = on_forced, on_early
        self._lock = threading.Lock()  # between a stop that ends the process and the run that begins
        self._requested = threading.Event()
        self._signal_name, self._reason = "", ""
        self._handlers: dict[int, Any] = {}
        self._old_wakeup_fd = -1
        self._reading: socket.socket | None = None
        self._writing: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def __bool__(self) -> bool:
        """Whether a stop was requested of this process."""
        return self._requested.is_set()

    @property
    def signal_name(self) -> str:
        """The signal that asked first, such as "SIGTERM"; empty while none has."""
        return self._signal_name

    @property
    def reason(self) -> str | None:
        """Why this process is to stop, such as "SIGTERM was received"; None while nothing asked for it."""
        return self._reason if self else None

    def request(self, reason: str) -> bool:
        """Ask for a stop as a signal does that never forces the end; False if the flag was never entered."""
        if self._thread is None:
            return False
        with self._lock:
            if not self._requested.is_set():
                self._reason = reason
                self._requested.set()
                if self._on_early is not None:
                    self._on_early(reason)
        return True

    def defer(self) -> None:
        """From now on a stop only sets the flag, because the run looks at it."""
        with self._lock:
            self._on_early = None

    def wait(self, timeout_s: float) -> bool:
        """Wait until a stop is requested or the time is over; whether it was requested."""
        return self._requested.wait(timeout_s)

    def __enter__(self) -> StopFlag:
        """Install the handlers.

        Raises: ValueError outside the main thread of the process, where Python does not allow it.
        """
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._old_wakeup_fd = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        # A Python handler must exist for the C level to write to the socket; the thread does the rest.
        handled = (number for number in STOP_SIGNALS if not _is_left_ignored(number))
        self._thread = threading.Thread(target=self._watch, args=(self._reading,), name="stop-flag", daemon=True)
        self._handlers = {number: signal.signal(number, _leave_it_to_the_thread) for number in handled}
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers and end the thread.

        After a stop the process is about to end and the signals are ignored instead: one that was on its way twice
        must not kill it while it writes how it ended.
        """
        assert self._reading and self._writing and self._thread, "StopFlag was left without being entered"
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if kind is StopRequested else handler)
        signal.set_wakeup_fd(self._old_wakeup_fd)
        self._writing.close()  # the thread reads the end of the stream
        self._thread.join()
        self._reading.close()

    def _watch(self, reading: socket.socket) -> None:
        """Take signals from the socket until it is closed: the first sets the flag, a later one may force the end."""
        forcing_since: float | None = None
        while received := reading.recv(64):
            for number in received:
                if number in STOP_SIGNALS and not self._requested.is_set():
                    self._signal_name = signal.Signals(number).name
                    self.request(f"{self._signal_name} was received")
                if number not in FORCING_SIGNALS:
                    continue
                now = time.monotonic()
                if forcing_since is None:
                    forcing_since = now
                elif now - forcing_since >= self._relay_window_s:
                    self._force(number)

    def _force(self, number: int) -> None:
        """End the process now; nothing else can if the main thread is stuck in a collective."""
        code = 128 + number
        try:
            sys.stderr.write(f"Second {signal.Signals(number).name}: ending without a save, exit code {code}.\n")
            sys.stderr.flush()
            if self._on_forced is not None:
                self._on_forced(code)
        finally:
            os._exit(code)


def _is_left_ignored(number: int) -> bool:
    """Whether whoever started this process wants it to outlive the signal: `nohup` and SIGHUP."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """The Python-level handler: nothing to do, the number is already in the socket."""
