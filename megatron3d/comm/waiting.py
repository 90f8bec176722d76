"""What a rank waits for, and what it means when the wait fails: the names behind the error of a backend.

Backends report a lost or silent peer by an address or by nothing. Here every wait knows its collective, its axis and
the ranks that take part, so that the error can name them and `roll_call.py` can ask who of them is there.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Sequence
from types import TracebackType

import torch.distributed as dist
from torch.profiler import record_function

from megatron3d.comm.meter import Meter, Wait
from megatron3d.errors import PeerError

_STDERR = 2
# What gloo and NCCL say of a peer whose connection ended, and of one that was silent too long.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "gloo/transport", "NCCL error")
_SILENT = ("Timed out waiting", "Application timeout caused pair closure", "Operation timed out!", "Read timeout")
_TIMED_OUT = (*_SILENT, "timed out", "timeout", "Timeout")


class CollectiveError(PeerError):
    """A collective that lost a rank, or waited for one until its timeout.

    `waited_for` describes the collective, its axis and its ranks.
    """

    def __init__(self, message: str, *, waited_for: str = "a collective") -> None:
        super().__init__(message)
        self.waited_for = waited_for


class Waiting:
    """A context manager around one blocking wait, which the meter names while it lasts.

    An error that means that a peer is lost or silent becomes a `CollectiveError`; if it was silent, the stacks of all
    threads go to standard error first, while they still show the wait.
    """

    def __init__(self, collective: str, axis: str, ranks: Sequence[int], meter: Meter | None = None) -> None:
        self._wait, self._meter = Wait(collective, axis, ranks), meter
        self._event: record_function | None = None

    def __enter__(self) -> Waiting:
        """Remember what is waited for."""
        if self._meter is not None:
            self._meter.begin_wait(self._wait)
            if self._meter.profiles:
                self._event = record_function(f"wait {self._wait.axis} {self._wait.collective}")
                self._event.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget it, or name it in the error. Raises: CollectiveError."""
        if self._event is not None:
            self._event.__exit__(kind, error, trace)
        if error is None:
            if self._meter is not None:
                self._meter.end_wait()
        elif isinstance(error, Exception) and not isinstance(error, PeerError) and is_peer_failure(error):
            if is_timeout(error):
                faulthandler.dump_traceback(file=_STDERR, all_threads=True)
            waited_for = str(self._wait)
            raise CollectiveError(f"{waited_for}: {first_line(error)}", waited_for=waited_for) from error


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error came from a collective that lost a peer or timed out."""
    if isinstance(error, PeerError | dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in (*_LOST, *_SILENT))


def is_timeout(error: BaseException) -> bool:
    """Whether the error of a lost peer means that it was silent too long, and not that its connection ended."""
    text = str(error)
    return any(sign in text for sign in _TIMED_OUT) and not any(sign in text for sign in _LOST[:3])


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or else its kind."""
    return (str(error) or type(error).__name__).splitlines()[0]
