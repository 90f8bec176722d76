"""OffloadedStates: the optimizer step over master weights and moments that live in host memory or in files.

A step takes the units one after another: a unit's record comes to the host, the optimizer's tensors of the unit are
attached to it, its gradients come from the device, the optimizer updates what has a gradient, and the new weights go
to the device. Outside of that the optimizer's tensors are empty. The same arithmetic on the same values as without
offloading, so on the CPU the results are the same to the last bit.

The records, the optimizer and its tensors belong to whoever is in a call of this class, and to one caller at a time:
`delayed.py`, whose thread makes such calls, says from when to when that is the thread.

Source: Ren et al. 2021 (ZeRO-Offload), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from megatron3d.comm.device import HostCopies, empty_on_host
from megatron3d.offload.backing import NUM_SLOTS, Fields
from megatron3d.offload.stream import Waitable
from megatron3d.zero.buffers import size_bytes
from megatron3d.zero.offload import MASTER, Offload
from megatron3d.zero.unit import FlatUnit


class OffloadedStates:
    """The states of all units of a rank, which `FlatUnit` has put into `offload.states`."""

    def __init__(self, units: Mapping[str, FlatUnit], offload: Offload, device: torch.device) -> None:
        assert offload.states is not None, "states that stay on the device have no backing"
        self._backing, self._kinds = offload.states, offload.state_kinds
        self._units = dict(units)
        self._backing.prepare()
        self._gradients = _HostGradients(self._units, device)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of host memory that are held beside the backing's."""
        return self._gradients.buffer_bytes

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update every unit and bring its weights to the device.

        Raises:
            StorageError: a file could not be read or written, or is damaged.
        """

        def work(name: str, fields: Fields) -> None:
            self.update(optimizer, name, fields, self._gradients.arrived(name))
            self._units[name].weights.set_shard(fields[MASTER])

        self.for_each(work, start_ahead=self._gradients.start)

    def for_each(
        self, work: Callable[[str, Fields], None], *, start_ahead: Callable[[str, int], Waitable] | None = None
    ) -> None:
        """Call `work` with every unit's record in turn; see `StateBacking.for_each`.

        Raises:
            StorageError: a file could not be read or written, or is damaged.
        """
        self._backing.for_each(list(self._units), work, start_ahead=start_ahead)

    def update(self, optimizer: torch.optim.Optimizer, name: str, fields: Fields, gradients: Tensor) -> None:
        """Update one unit's record by its gradients, which are on the host."""
        with self._attached(optimizer, name, fields), self._units[name].gradients_attached(gradients):
            optimizer.step()

    def bring_weights(self) -> None:
        """Bring the master weights of every unit to the device as they are."""
        self.for_each(lambda name, fields: self._units[name].weights.set_shard(fields[MASTER]))

    @contextmanager
    def opened(self, optimizer: torch.optim.Optimizer, *, writes: bool) -> Iterator[None]:
        """Attach units and optimizer to all records at once, for a checkpoint to read or, with `writes`, to fill."""
        with ExitStack() as stack:
            records = stack.enter_context(self._backing.opened(list(self._units), writes=writes))
            for name, fields in records.items():
                stack.enter_context(self._attached(optimizer, name, fields))
                self._units[name].weights.master = fields[MASTER]
            try:
                yield
            finally:
                for unit in self._units.values():
                    unit.weights.master = None

    @contextmanager
    def _attached(self, optimizer: torch.optim.Optimizer, name: str, fields: Fields) -> Iterator[None]:
        """Show the optimizer a unit's record in place of empty tensors."""
        unit = self._units[name]
        for flat in unit.flat_parameters:
            within = flat.span.shifted(-unit.own.start).slice
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


class _HostGradients:
    """The reduced gradients of the units on the host: where they are on the CPU, or in a few buffers for copies."""

    def __init__(self, units: Mapping[str, FlatUnit], device: torch.device) -> None:
        self._units, self._device, self._copies = units, device, HostCopies(device)
        self._slots: list[Tensor] = []
        self._arrived: dict[str, Tensor] = {}

    @property
    def buffer_bytes(self) -> int:
        return sum(size_bytes(one) for one in self._slots)

    def start(self, name: str, slot: int) -> Waitable:
        """Start bringing a unit's gradients into one of a few buffers, where they are not on the host."""
        gradients = self._units[name].own_grads
        if self._device.type == "cpu":
            self._arrived[name] = gradients
            return self._copies.nothing()
        if not self._slots:
            largest = max(unit.own.length for unit in self._units.values())
            room = largest * torch.float32.itemsize
            self._slots = [empty_on_host(room, self._device).view(torch.float32) for _ in range(NUM_SLOTS)]
        self._arrived[name] = self._slots[slot][: gradients.numel()]
        return self._copies.start(self._arrived[name], gradients)

    def arrived(self, name: str) -> Tensor:
        """What `start` brought."""
        return self._arrived.pop(name)
