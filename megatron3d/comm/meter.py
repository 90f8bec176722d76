"""Meter: calls and bytes of every collective, counted where they are issued, and what is waited for now.

Claims about communication are proved by counting, because the time that a collective takes on a test machine says
nothing about a cluster.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Count:
    """Calls of one collective on one axis, and the bytes of the whole (gathered, unscattered) tensor in each."""

    calls: int = 0
    payload_bytes: int = 0


@dataclass(frozen=True)
class Wait:
    """A wait for a collective, of the host or, with `is_over`, of the device behind it.

    Attributes:
        collective: its name.
        axis: the name of its axis.
        ranks: global ranks that take part.
        began_s: `time.monotonic()` when it began.
        is_over: whether the device is past it; None where the host itself waits.
    """

    collective: str
    axis: str
    ranks: Sequence[int]
    began_s: float = field(default_factory=time.monotonic)
    is_over: Callable[[], bool] | None = None

    def __str__(self) -> str:
        ranks = self.ranks
        listed = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
        return f"{self.collective} over {self.axis} (ranks {listed})"


@dataclass
class Meter:
    """Counts by (axis name, collective name), such as ("tp", "all_reduce"). One meter belongs to one mesh.

    While `profiles` is set, each wait is an event of torch's profiler. `mark`, where the device waits instead of the
    host, marks the moment at which everything that is queued now is done, and returns whether that has come.
    """

    counts: dict[tuple[str, str], Count] = field(default_factory=dict)
    profiles: bool = False
    mark: Callable[[], Callable[[], bool]] | None = None
    _of_host: Wait | None = None
    _of_device: deque[Wait] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, axis: str, collective: str, payload_bytes: int) -> None:
        """Count one call."""
        count = self.counts.setdefault((axis, collective), Count())
        count.calls += 1
        count.payload_bytes += payload_bytes

    def begin_wait(self, wait: Wait) -> None:
        """The host waits from now on."""
        self._of_host = wait

    def end_wait(self) -> None:
        """The host waits no more; where a device waits instead, that is remembered until it is over."""
        wait, self._of_host = self._of_host, None
        if self.mark is None or wait is None:
            return
        with self._lock:
            self._forget_what_is_over()
            self._of_device.append(Wait(wait.collective, wait.axis, wait.ranks, wait.began_s, self.mark()))

    def oldest_wait(self) -> Wait | None:
        """What has been waited for longest and is not there yet; None if nothing is waited for. From any thread."""
        with self._lock:
            self._forget_what_is_over()
            return self._of_device[0] if self._of_device else self._of_host

    def _forget_what_is_over(self) -> None:
        """A device comes to its waits in their order."""
        while self._of_device and (is_over := self._of_device[0].is_over) is not None and is_over():
            self._of_device.popleft()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.counts.clear()

    def read(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(calls, payload bytes) by (axis, collective)."""
        return {key: (count.calls, count.payload_bytes) for key, count in self.counts.items()}


def wire_bytes(collective: str, payload_bytes: int, num_ranks: int) -> float:
    """Bytes that one rank sends for a collective by the bandwidth-optimal ring.

    With n bytes in the whole tensor: all-gather, reduce-scatter and a pipelined broadcast (on average over the ranks)
    n(N-1)/N, all-reduce twice that; an all-to-all, of which each rank receives n, the same where all send each other
    equally much; a message n at its sender and nothing at its receiver.

    Source: Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    share = (num_ranks - 1) / num_ranks
    factors = {"all_gather": share, "reduce_scatter": share, "all_reduce": 2 * share, "broadcast": share}
    factors |= {"all_to_all": share, "send": 1.0, "receive": 0.0}
    return payload_bytes * factors[collective]
