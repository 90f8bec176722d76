"""OffloadedStates: the optimizer step over master weights and moments that live in host memory or in files.

A step takes the records one after another, of which a unit has one, or one for each block of a table that is cut: a
record comes to the host, the optimizer's tensors of the unit are attached to it, its gradients come from the device,
the optimizer updates what has a gradient, and the new weights go to the device. Outside of that the optimizer's tensors
are empty. The same arithmetic on the same values as without offloading, so on the CPU the results are the same to the
last bit.

The records, the optimizer and its tensors belong to whoever is in a call of this class, and to one caller at a time:
`delayed.py`, whose thread makes such calls, says from when to when that is the thread.

Source: Ren et al. 2021 (ZeRO-Offload), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron3d.comm.device import HostCopies, empty_on_host
from megatron3d.offload.backing import NUM_SLOTS, Fields
from megatron3d.offload.stream import Waitable
from megatron3d.zero.buffers import size_bytes
from megatron3d.zero.flat import Span
from megatron3d.zero.offload import MASTER, Offload
from megatron3d.zero.unit import FlatUnit


@dataclass(frozen=True)
class StatePart:
    """What one record holds: a range of the elements that this rank owns of a unit."""

    unit: str
    span: Span


class OffloadedStates:
    """The states of all units of a rank, which `FlatUnit` has put into `offload.states`."""

    def __init__(self, units: Mapping[str, FlatUnit], offload: Offload, device: torch.device) -> None:
        assert offload.states is not None, "states that stay on the device have no backing"
        self._backing, self._kinds = offload.states, offload.state_kinds
        self._units = dict(units)
        self._parts = {
            record: StatePart(name, span) for name, unit in units.items() for record, span in unit.state_records()
        }
        self._counters: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._backing.prepare()
        self._gradients = _HostGradients(self._units, self._parts, device)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of host memory that are held beside the backing's."""
        return self._gradients.buffer_bytes

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update every unit and bring its weights to the device.

        Raises:
            StorageError: a file could not be read or written, or is damaged.
        """

        def work(part: StatePart, fields: Fields) -> None:
            self.update(optimizer, part, fields, self._gradients.arrived(part))
            self._units[part.unit].weights.set_shard(fields[MASTER], part.span)

        self.for_each(work, start_ahead=self._gradients.start)

    def for_each(
        self, work: Callable[[StatePart, Fields], None], *, start_ahead: Callable[[str, int], Waitable] | None = None
    ) -> None:
        """Call `work` with every record in turn; see `StateBacking.for_each`.

        Raises:
            StorageError: a file could not be read or written, or is damaged.
        """

        def of_part(record: str, fields: Fields) -> None:
            work(self._parts[record], fields)

        self._backing.for_each(list(self._parts), of_part, start_ahead=start_ahead)

    def update(self, optimizer: torch.optim.Optimizer, part: StatePart, fields: Fields, gradients: Tensor) -> None:
        """Update one record by its gradients, which are on the host."""
        unit = self._units[part.unit]
        self._count_once(optimizer, unit, part.span)
        with self._attached(optimizer, unit, part.span, fields), unit.gradients_attached(gradients, part.span):
            optimizer.step()

    def _count_once(self, optimizer: torch.optim.Optimizer, unit: FlatUnit, span: Span) -> None:
        """Let what the optimizer counts of a parameter, such as its updates, be for every record what it was for the
        first one of the parameter."""
        for flat in unit.flat_parameters:
            own = flat.span.shifted(-unit.own.start)
            if not own.intersect(span).length:
                continue
            state = optimizer.state[flat.parameter]
            if own.start >= span.start:
                self._counters[flat.parameter] = {key: one.clone() for key, one in state.items() if one.dim() == 0}
            else:
                for key, value in self._counters[flat.parameter].items():
                    state[key].copy_(value)

    def bring_weights(self) -> None:
        """Bring the master weights of every unit to the device as they are."""
        self.for_each(lambda part, fields: self._units[part.unit].weights.set_shard(fields[MASTER], part.span))

    @contextmanager
    def opened(self, optimizer: torch.optim.Optimizer, *, writes: bool) -> Iterator[None]:
        """Attach units and optimizer to all records at once, for a checkpoint to read or, with `writes`, to fill; to
        copies of those that hold a block each."""
        with ExitStack() as stack:
            records = stack.enter_context(self._backing.opened(list(self._parts), writes=writes))
            for unit in self._units.values():
                fields = stack.enter_context(_joined([records[name] for name, _ in unit.state_records()], writes))
                stack.enter_context(self._attached(optimizer, unit, Span(0, unit.own.length), fields))
                unit.weights.master = fields[MASTER]
            try:
                yield
            finally:
                for unit in self._units.values():
                    unit.weights.master = None

    @contextmanager
    def _attached(self, optimizer: torch.optim.Optimizer, unit: FlatUnit, span: Span, fields: Fields) -> Iterator[None]:
        """Show the optimizer a record of a unit in place of empty tensors."""
        for flat in unit.flat_parameters:
            within = flat.span.shifted(-unit.own.start).intersect(span).shifted(-span.start).slice
            flat.parameter.data = fields[MASTER][within]
            for kind, _ in self._kinds:
                optimizer.state[flat.parameter][kind] = fields[kind][within]
        try:
            yield
        finally:
            for flat in unit.flat_parameters:
                flat.parameter.data = torch.empty(0)
                for kind, dtype in self._kinds:
                    optimizer.state[flat.parameter][kind] = torch.empty(0, dtype=dtype)


@contextmanager
def _joined(records: list[Fields], writes: bool) -> Iterator[Fields]:
    """The fields of a unit's records, of several as copies on the host that are kept with `writes`."""
    if len(records) == 1:
        yield records[0]
        return
    fields = {name: torch.cat([record[name] for record in records]) for name in records[0]}
    yield fields
    for name, joined in fields.items() if writes else ():
        for record, values in zip(records, joined.split([one[name].numel() for one in records]), strict=True):
            record[name].copy_(values)


class _HostGradients:
    """The reduced gradients of the units on the host: where they are on the CPU, or in a few buffers for copies."""

    def __init__(self, units: Mapping[str, FlatUnit], parts: Mapping[str, StatePart], device: torch.device) -> None:
        self._units, self._parts, self._device, self._copies = units, parts, device, HostCopies(device)
        self._slots: list[Tensor] = []
        self._arrived: dict[StatePart, Tensor] = {}

    @property
    def buffer_bytes(self) -> int:
        return sum(size_bytes(one) for one in self._slots)

    def start(self, record: str, slot: int) -> Waitable:
        """Start bringing a record's gradients into one of a few buffers, where they are not on the host."""
        part = self._parts[record]
        gradients = self._units[part.unit].own_grads[part.span.slice]
        if self._device.type == "cpu":
            self._arrived[part] = gradients
            return self._copies.nothing()
        if not self._slots:
            largest = max(one.span.length for one in self._parts.values())
            room = largest * torch.float32.itemsize
            self._slots = [empty_on_host(room, self._device).view(torch.float32) for _ in range(NUM_SLOTS)]
        self._arrived[part] = self._slots[slot][: gradients.numel()]
        return self._copies.start(self._arrived[part], gradients)

    def arrived(self, part: StatePart) -> Tensor:
        """What `start` brought."""
        return self._arrived.pop(part)
