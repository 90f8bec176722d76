"""Where the offloaded state of the units lives: in host memory, or in files with a few staging buffers on the host.

A backing keeps one record of bytes for each unit. `for_each` works on the units one after another: each is on the host
while it is worked on and is kept as it was left. `opened` gives all of them at once, for checkpoints: of a backing in
files these are mappings, which take no memory of the process. `start_fetch` and `start_store` move a whole record from
and to the device.

Source: Ren et al. 2021 (ZeRO-Offload), section 3; Rajbhandari et al. 2021 (ZeRO-Infinity), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from megatron3d.comm.device import HostCopies, empty_on_host
from megatron3d.offload.file_store import FileStore
from megatron3d.offload.record import Record
from megatron3d.offload.stream import Waitable, num_slots, stream

Fields = dict[str, Tensor]
READ_AHEAD = 1  # units; with the one computed and the one written, three are on the host


class _Done:
    """Something that is over already."""

    def wait(self) -> None:
        """Return."""


class _Both:
    """Two things under way."""

    def __init__(self, first: Waitable, second: Waitable) -> None:
        self._first, self._second = first, second

    def wait(self) -> None:
        """Return when both are over, whether or not the first failed."""
        try:
            self._first.wait()
        finally:
            self._second.wait()


class _ThenCopy:
    """A read into a staging buffer on the host, and the copy from there to the device."""

    def __init__(self, read: Waitable, copies: HostCopies, into: Tensor, staging: Tensor) -> None:
        self._read, self._copies, self._into, self._staging = read, copies, into, staging

    def wait(self) -> None:
        """Return when the device holds it."""
        self._read.wait()
        self._copies.start(self._into, self._staging).wait()


class StateBacking(Protocol):
    """What both backings do. Names are those of units; every record starts as zeros."""

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are taken."""
        ...

    @property
    def file_bytes(self) -> int:
        """Bytes of disk that are taken."""
        ...

    def add(self, name: str, record: Record) -> None:
        """Take room for a unit."""
        ...

    def prepare(self) -> None:
        """Allocate what `for_each` needs beside the records, once all units are added; its first call would."""
        ...

    def for_each(
        self,
        names: Sequence[str],
        work: Callable[[str, Fields], None],
        *,
        start_ahead: Callable[[str, int], Waitable] | None = None,
    ) -> None:
        """Call `work` with each unit's fields on the host, in order, and keep what it leaves in them.

        `start_ahead(name, slot)` starts what else a unit's work waits for, such as a copy of its gradients into one of
        `NUM_SLOTS` buffers; it runs ahead as reads do.
        """
        ...

    def opened(self, names: Sequence[str], *, writes: bool) -> AbstractContextManager[dict[str, Fields]]:
        """All units' fields for the length of a block; `writes` keeps changes."""
        ...

    def start_fetch(self, name: str, into: Tensor) -> Waitable:
        """Start copying a unit's record of one field to `into`, on the device."""
        ...

    def start_store(self, name: str, source: Tensor) -> Waitable:
        """Start replacing a unit's record of one field by `source`, on the device or on the host."""
        ...


NUM_SLOTS = num_slots(READ_AHEAD)


class HostBacking:
    """Records in host memory, pinned where the device is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, HostCopies(device)
        self._fields: dict[str, Fields] = {}
        self.host_bytes = self.file_bytes = 0

    def prepare(self) -> None:
        """Nothing: `for_each` works in the records themselves."""

    def add(self, name: str, record: Record) -> None:
        """Take room for a unit, filled with zeros."""
        self._fields[name] = record.views(empty_on_host(record.num_bytes, self._device).zero_())
        self.host_bytes += record.num_bytes

    def for_each(
        self,
        names: Sequence[str],
        work: Callable[[str, Fields], None],
        *,
        start_ahead: Callable[[str, int], Waitable] | None = None,
    ) -> None:
        """Call `work` with each unit's fields in order; see `StateBacking`."""
        done = _Done()
        stream(
            names,
            start_read=start_ahead or (lambda name, slot: done),
            compute=lambda name, slot: work(name, self._fields[name]),
            start_write=lambda name, slot: done,
            read_ahead=READ_AHEAD,
        )

    @contextmanager
    def opened(self, names: Sequence[str], *, writes: bool) -> Iterator[dict[str, Fields]]:
        """The records themselves."""
        yield {name: self._fields[name] for name in names}

    def start_fetch(self, name: str, into: Tensor) -> Waitable:
        """Start copying a record of one field to the device."""
        (held,) = self._fields[name].values()
        return self._copies.start(into, held)

    def start_store(self, name: str, source: Tensor) -> Waitable:
        """Start copying a record of one field from the device, or from the host."""
        (held,) = self._fields[name].values()
        return self._copies.start(held, source)


class FileBacking:
    """Records in a `FileStore`; `NUM_SLOTS` staging buffers of the largest record's size are all it has on the host."""

    def __init__(self, store: FileStore, device: torch.device) -> None:
        self._store, self._device, self._copies = store, device, HostCopies(device)
        self._records: dict[str, Record] = {}
        self._slots: list[Tensor] = []

    def prepare(self) -> None:
        """Take the staging buffers."""
        largest = max((record.num_bytes for record in self._records.values()), default=0)
        if not self._slots or self._slots[0].numel() < largest:
            self._slots = [empty_on_host(largest, self._device) for _ in range(NUM_SLOTS)]

    @property
    def host_bytes(self) -> int:
        """Bytes of the staging buffers, once they are taken."""
        return sum(slot.numel() for slot in self._slots)

    @property
    def file_bytes(self) -> int:
        """Bytes of disk that are taken."""
        return self._store.size_bytes

    def add(self, name: str, record: Record) -> None:
        """Take room on the disk for a unit, filled with zeros.

        Raises:
            StorageError: the disk is full.
        """
        self._store.reserve(name, record.num_bytes)
        self._records[name] = record

    def for_each(
        self,
        names: Sequence[str],
        work: Callable[[str, Fields], None],
        *,
        start_ahead: Callable[[str, int], Waitable] | None = None,
    ) -> None:
        """Call `work` with each unit's fields in order, reading the next and writing the last meanwhile.

        Raises:
            StorageError: the disk refused, or what was read is not what was written.
        """
        self.prepare()

        def buffer(name: str, slot: int) -> Tensor:
            return self._slots[slot][: self._records[name].num_bytes]

        def start_read(name: str, slot: int) -> Waitable:
            read = self._store.start_read(name, buffer(name, slot))
            return read if start_ahead is None else _Both(read, start_ahead(name, slot))

        stream(
            names,
            start_read=start_read,
            compute=lambda name, slot: work(name, self._records[name].views(buffer(name, slot))),
            start_write=lambda name, slot: self._store.start_write(name, buffer(name, slot)),
            read_ahead=READ_AHEAD,
        )

    @contextmanager
    def opened(self, names: Sequence[str], *, writes: bool) -> Iterator[dict[str, Fields]]:
        """The records as mappings of the file.

        Raises:
            StorageError: what is there is not what was written.
        """
        with ExitStack() as stack:
            mapped = {name: stack.enter_context(self._store.mapped(name, writes=writes)) for name in names}
            yield {name: self._records[name].views(buffer) for name, buffer in mapped.items()}

    def start_fetch(self, name: str, into: Tensor) -> Waitable:
        """Start reading a record of one field, on its way to the device."""
        if self._device.type == "cpu":
            return self._store.start_read(name, into)
        staging = empty_on_host(self._records[name].num_bytes, self._device)
        return _ThenCopy(self._store.start_read(name, staging), self._copies, into.view(torch.uint8), staging)

    def start_store(self, name: str, source: Tensor) -> Waitable:
        """Start writing a record of one field from the device."""
        if self._device.type == "cpu":
            return self._store.start_write(name, source)
        staging = empty_on_host(self._records[name].num_bytes, self._device)
        self._copies.start(staging, source.view(torch.uint8)).wait()
        return self._store.start_write(name, staging)
