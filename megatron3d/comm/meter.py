"""Meter: calls and bytes of every collective, counted where they are issued.

Claims about communication are proved by counting, because the time that a collective takes on a test machine says
nothing about a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Count:
    """Calls of one collective on one axis, and the bytes of the whole (gathered, unscattered) tensor in each."""

    calls: int = 0
    payload_bytes: int = 0


@dataclass
class Meter:
    """Counts by (axis name, collective name), such as ("tp", "all_reduce"). One meter belongs to one mesh.

    `waiting_for` is what the rank waits for at this moment, as (collective, axis, global ranks); None if for nothing.
    While `profiles` is set, each wait is an event of torch's profiler.
    """

    counts: dict[tuple[str, str], Count] = field(default_factory=dict)
    waiting_for: tuple[str, str, Sequence[int]] | None = None
    profiles: bool = False

    def add(self, axis: str, collective: str, payload_bytes: int) -> None:
        """Count one call."""
        count = self.counts.setdefault((axis, collective), Count())
        count.calls += 1
        count.payload_bytes += payload_bytes

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
