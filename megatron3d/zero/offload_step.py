"""OffloadedStates: the optimizer step over master weights and moments that live in host memory or in files.

A step takes the units one after another: a unit's record comes to the host, the optimizer's tensors of the unit are
laid over it, its gradients come from the device, the optimizer updates what has a gradient, and the new weights go to
the device. Outside of that the optimizer's tensors are empty. The same arithmetic on the same values as without
offloading, so on the CPU the results are the same to the last bit.

A delayed update makes the step in a thread beside the next forward and backward, whose gradients so belong to weights
that are one update old. It keeps a copy of the gradients and of the new weights on the host.

Source: Ren et al. 2021 (ZeRO-Offload), sections 4.1 and 5.2 (one-step delayed parameter update).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron3d.comm.device import HostCopies, empty_on_host
from megatron3d.offload.home import NUM_SLOTS, Fields
from megatron3d.offload.stream import Waitable
from megatron3d.zero.buffers import size_bytes
from megatron3d.zero.offload import MASTER, Offload
from megatron3d.zero.unit import FlatUnit


class OffloadedStates:
    """The states of all units of a rank, which `FlatUnit` has put into `offload.states`."""

    def __init__(self, units: Mapping[str, FlatUnit], offload: Offload, device: torch.device) -> None:
        assert offload.states is not None, "states that stay on the device have no home"
        self._home, self._kinds, self.delays_update = offload.states, offload.state_kinds, offload.delays_update
        self._units, self._device = dict(units), device
        self._home.prepare()
        self._gradients = _Gradients(self._units, device)
        self._new_weights: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="delayed-update") if self.delays_update else None
        self._running: Future[None] | None = None

    @property
    def buffer_bytes(self) -> int:
        """Bytes of host memory that are held beside the home's."""
        return self._gradients.buffer_bytes + sum(size_bytes(one) for one in self._new_weights.values())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update every unit and bring its weights to the device.

        Raises:
            StorageError: a file could not be read or written, or is damaged.
        """

        def work(name: str, fields: Fields) -> None:
            self._update(optimizer, name, fields, self._gradients.landed(name))
            self._units[name].weights.set_shard(fields[MASTER])

        self._home.visit(list(self._units), work, start_ahead=self._gradients.start)

    def start_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Start updating every unit in a thread, with the gradients and rates of this moment."""
        assert self._thread is not None and self._running is None, "the update before has not been finished"
        self._gradients.keep_all()
        for name, unit in self._units.items():
            if name not in self._new_weights:
                dtype = unit.options.param_dtype
                room = empty_on_host(unit.own.length * dtype.itemsize, self._device)
                self._new_weights[name] = room.view(dtype)

        def work(name: str, fields: Fields) -> None:
            self._update(optimizer, name, fields, self._gradients.kept(name))
            self._new_weights[name].copy_(fields[MASTER])

        self._running = self._thread.submit(self._home.visit, list(self._units), work)

    def finish_step(self) -> bool:
        """Wait for an update that was started, and bring its weights to the device; False where there was none.

        Raises:
            StorageError: a file could not be read or written, or is damaged.
        """
        if self._running is None:
            return False
        running, self._running = self._running, None
        running.result()
        for name, unit in self._units.items():
            unit.weights.set_shard(self._new_weights[name])
        return True

    def bring_weights(self) -> None:
        """Bring the master weights of every unit to the device as they are."""
        self._home.visit(list(self._units), lambda name, fields: self._units[name].weights.set_shard(fields[MASTER]))

    @contextmanager
    def opened(self, optimizer: torch.optim.Optimizer, *, writes: bool) -> Iterator[None]:
        """Lay units and optimizer over all records at once, for a checkpoint to read or, with `writes`, to fill."""
        assert self._running is None, "a delayed update is under way"
        with self._home.opened(list(self._units), writes=writes) as records:
            for name, fields in records.items():
                self._lay(optimizer, name, fields)
                self._units[name].weights.master = fields[MASTER]
            try:
                yield
            finally:
                for name, unit in self._units.items():
                    self._lift(optimizer, name)
                    unit.weights.master = None

    def _update(self, optimizer: torch.optim.Optimizer, name: str, fields: Fields, gradients: Tensor) -> None:
        self._lay(optimizer, name, fields)
        unit = self._units[name]
        for piece in unit.pieces:
            piece.parameter.grad = gradients[piece.span.shifted(-unit.own.start).slice]
        optimizer.step()
        self._lift(optimizer, name)

    def _lay(self, optimizer: torch.optim.Optimizer, name: str, fields: Fields) -> None:
        unit = self._units[name]
        for piece in unit.pieces:
            within = piece.span.shifted(-unit.own.start).slice
            piece.parameter.data = fields[MASTER][within]
            for kind, _ in self._kinds:
                optimizer.state[piece.parameter][kind] = fields[kind][within]

    def _lift(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        for piece in self._units[name].pieces:
            piece.parameter.grad = None
            piece.parameter.data = torch.empty(0)
            for kind, dtype in self._kinds:
                optimizer.state[piece.parameter][kind] = torch.empty(0, dtype=dtype)


class _Gradients:
    """The reduced gradients of the units on the host: where they are on the CPU, or in buffers they are copied to."""

    def __init__(self, units: Mapping[str, FlatUnit], device: torch.device) -> None:
        self._units, self._device, self._copies = units, device, HostCopies(device)
        self._slots: list[Tensor] = []
        self._landed: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    @property
    def buffer_bytes(self) -> int:
        return sum(size_bytes(one) for one in (*self._slots, *self._kept.values()))

    def start(self, name: str, slot: int) -> Waitable:
        """Start bringing a unit's gradients into one of a few buffers, where they are not on the host."""
        gradients = _own(self._units[name])
        if self._device.type == "cpu":
            self._landed[name] = gradients
            return self._copies.nothing()
        if not self._slots:
            largest = max(unit.own.length for unit in self._units.values())
            self._slots = [self._new(largest) for _ in range(NUM_SLOTS)]
        self._landed[name] = self._slots[slot][: gradients.numel()]
        return self._copies.start(self._landed[name], gradients)

    def landed(self, name: str) -> Tensor:
        """What `start` brought."""
        return self._landed.pop(name)

    def keep_all(self) -> None:
        """Copy the gradients of all units to buffers of their own, which outlast the step."""
        if not self._kept:
            self._kept = {name: self._new(unit.own.length) for name, unit in self._units.items()}
        copies = [self._copies.start(self._kept[name], _own(unit)) for name, unit in self._units.items()]
        for copy in copies:
            copy.wait()

    def kept(self, name: str) -> Tensor:
        """What `keep_all` copied."""
        return self._kept[name]

    def _new(self, length: int) -> Tensor:
        return empty_on_host(length * torch.float32.itemsize, self._device).view(torch.float32)


def _own(unit: FlatUnit) -> Tensor:
    assert unit.own_grads is not None, f"unit {unit.name} has no reduced gradients"
    return unit.own_grads
