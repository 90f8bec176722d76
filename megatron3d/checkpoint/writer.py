"""The handle of a rank's writer process: started with the first order, asked for one thing at a time."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from megatron3d.checkpoint import writer_process
from megatron3d.checkpoint.host_buffer import HostBuffer
from megatron3d.checkpoint.writer_process import WriteOrder, WriteOutcome
from megatron3d.errors import StorageError

_ROOT = Path(__file__).resolve().parents[2]
_END_S = 5.0  # for a process whose input has ended and that has nothing to write


class WriterProcess:
    """Writes from a buffer. One that has ended, for whatever reason, is replaced with the next order."""

    def __init__(self, buffer: HostBuffer) -> None:
        """Start nothing yet; `buffer` must not change between an order and its outcome."""
        self._buffer = buffer
        self._process: subprocess.Popen[bytes] | None = None
        self._answer = b""  # as far as it has come
        self._is_over = True
        self._failure: OSError | None = None

    def give(self, order: WriteOrder) -> None:
        """Have the process begin; that it cannot be started is left to `outcome`."""
        assert self._is_over, "a process writes one thing at a time"
        self._answer, self._is_over, self._failure = b"", False, None
        try:
            if self._process is not None and self._process.poll() is not None:  # while it had nothing to do
                _wait(self._process)
                self._process = None
            if self._process is None:
                self._process = self._start()
            assert self._process.stdin is not None
            self._process.stdin.write(f"{order.to_json()}\n".encode())
        except OSError as error:
            self._failure = error

    def _start(self) -> subprocess.Popen[bytes]:
        # Not a fork: this process has threads, sockets and perhaps a GPU. In a session of its own, so that what is
        # sent to the group of a terminal or of a launcher is left to the parent, whose end the process notices.
        return subprocess.Popen(
            [sys.executable, "-m", writer_process.__name__, str(self._buffer.fd), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=[self._buffer.fd],
            cwd=_ROOT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int | None:
        """The number of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def has_ended(self, *, timeout_s: float = 0.0) -> bool:
        """Whether the order is over, well or not, so that `outcome` need not wait; waits for that so long."""
        while not self._is_over and self._is_readable(timeout_s=timeout_s):
            self._read()
        return self._is_over or self._failure is not None

    def outcome(self) -> WriteOutcome:
        """Wait for the end of the order.

        Raises:
            StorageError: the process could not be started, or it ended before its order did.
        """
        while not self._is_over and self._failure is None:
            self._read()
        self._is_over = True
        if self._failure is not None or not self._answer.endswith(b"\n"):
            raise StorageError(f"{self._why_gone()}; the checkpoints before stand")
        return WriteOutcome.from_json(self._answer)

    def _is_readable(self, *, timeout_s: float) -> bool:
        if self._process is None or self._process.stdout is None:
            return False
        poll = select.poll()  # `select.select` takes no descriptor above 1,023
        poll.register(self._process.stdout, select.POLLIN)
        return bool(poll.poll(1000.0 * timeout_s))

    def _read(self) -> None:
        """Take what has come of the answer; waits for some."""
        assert self._process is not None and self._process.stdout is not None
        found = os.read(self._process.stdout.fileno(), 1 << 16)
        self._answer += found
        self._is_over = not found or found.endswith(b"\n")

    def _why_gone(self) -> str:
        """Why there is no answer, and forget the process."""
        process, self._process = self._process, None
        if process is None:
            return f"the process that writes checkpoints could not be started ({self._failure})"
        process.kill()  # one whose pipe broke is of no more use; a dead one does not mind
        code = _wait(process)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return (
            f"the process that writes checkpoints (pid {process.pid}) was ended by {how} before it had written its file"
        )

    def close(self) -> None:
        """End the process; one that is still writing is killed."""
        process, self._process = self._process, None
        if process is None:
            return
        if not self._is_over:
            process.kill()
        _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """End the process's input, wait for its end and return its exit code."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    try:
        return process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        process.stdout.close()
