"""The pipeline of a streamed update: while one unit is computed, the next is read and the one before is written.

Pure control flow over a few slots of memory, whatever they are; who reads and writes is passed in.

Source: Rajbhandari et al. 2021 (ZeRO-Infinity), section 6.2 (overlap-centric design).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol, TypeVar

Unit = TypeVar("Unit")


class Waitable(Protocol):
    """Something under way."""

    def wait(self) -> object:
        """Return when it is over."""
        ...


def num_slots(read_ahead: int) -> int:
    """Slots of memory that `stream` uses: one is computed, one written, and those ahead are read."""
    return read_ahead + 2


def stream(
    units: Sequence[Unit],
    *,
    start_read: Callable[[Unit, int], Waitable],
    compute: Callable[[Unit, int], None],
    start_write: Callable[[Unit, int], Waitable],
    read_ahead: int = 1,
) -> None:
    """Read, compute and write every unit in order, each in the slot of memory whose number is passed with it.

    A slot is read into only once what it held before is written. However this ends, nothing is under way afterwards.

    Args:
        units: what is computed.
        start_read: starts filling a slot with a unit.
        compute: works on a unit in its slot.
        start_write: starts writing a slot back.
        read_ahead: units whose reads run ahead of the one computed.
    """
    slots = num_slots(read_ahead)
    reads: dict[int, Waitable] = {}
    writes: dict[int, Waitable] = {}
    num_started = 0
    with ExitStack() as at_the_end:
        at_the_end.callback(_wait_for_all, reads)
        at_the_end.callback(_wait_for_all, writes)
        for number, unit in enumerate(units):
            while num_started < min(len(units), number + 1 + read_ahead):
                if num_started >= slots:
                    writes.pop(num_started - slots).wait()
                reads[num_started] = start_read(units[num_started], num_started % slots)
                num_started += 1
            reads.pop(number).wait()
            compute(unit, number % slots)
            writes[number] = start_write(unit, number % slots)


def _wait_for_all(pending: dict[int, Waitable]) -> None:
    with ExitStack() as stack:
        for one in pending.values():
            stack.callback(one.wait)
