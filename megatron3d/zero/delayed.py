"""DelayedUpdate: the offloaded optimizer step in a thread, beside the next forward and backward.

The gradients of a step so belong to weights that are one update old. After step N the master weights are those of N
updates, and the layers compute with those of N - 1 until the gradients of the step after are reduced:

    step N         reduce | start(N)
    step N + 1     forward and backward with the weights of N - 1 updates | reduce, finish(N), start(N + 1)

What belongs to the thread between `start` and `join`, so that nobody else reads or writes it: the records of the
states, the optimizer with its tensors and rates, the units' flat parameters, and the two kinds of buffers here. Every
method that touches one of them joins first. Gradients, weights and collectives are never the thread's: `start` copies
the gradients, and the new weights wait in a buffer on the host for the main thread to bring them to the layers.

Looking does not change a run. A checkpoint has the master weights and those that the layers compute with, and an
evaluation exchanges the two and afterwards exchanges them back.

Source: Ren et al. 2021 (ZeRO-Offload), section 5.2 (one-step delayed parameter update).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from megatron3d.comm.device import HostCopies, empty_on_host
from megatron3d.offload.backing import Fields
from megatron3d.zero.buffers import size_bytes
from megatron3d.zero.offload import MASTER
from megatron3d.zero.offload_step import OffloadedStates, StatePart
from megatron3d.zero.unit import FlatUnit


class DelayedUpdate:
    """The update under way or due of all units of a rank."""

    def __init__(self, states: OffloadedStates, units: Mapping[str, FlatUnit], device: torch.device) -> None:
        self._states, self._units, self._device = states, dict(units), device
        self._copies = HostCopies(device)
        self._gradients: dict[str, Tensor] = {}
        # The updated weights, in the dtype of the layers; while the layers show those, the weights they had before.
        self._waiting: dict[str, Tensor] = {}
        self._opened: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="delayed-update")
        self._running: Future[None] | None = None
        self._is_due = False
        self._is_shown = False

    @property
    def buffer_bytes(self) -> int:
        """Bytes of host memory that are held from the first update on."""
        return sum(size_bytes(one) for one in (*self._gradients.values(), *self._waiting.values()))

    @property
    def is_due(self) -> bool:
        """Whether there is an update that the layers have not got, under way or not."""
        return self._is_due or self._running is not None

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Start updating every unit in the thread, with the gradients and rates of this moment."""
        assert not self.is_due, "the update before has not reached the layers"
        self._allocate()
        copies = [self._copies.start(self._gradients[name], unit.own_grads) for name, unit in self._units.items()]
        for copy in copies:
            copy.wait()

        def work(part: StatePart, fields: Fields) -> None:
            within = part.span.slice
            self._states.update(optimizer, part, fields, self._gradients[part.unit][within])
            self._waiting[part.unit][within].copy_(fields[MASTER])

        self._running = self._thread.submit(self._states.for_each, work)

    def join(self) -> None:
        """Wait for the thread: what was the thread's is the caller's from here on.

        Raises:
            StorageError: a file could not be read or written, or is damaged.
        """
        if self._running is not None:
            running, self._running = self._running, None
            running.result()
            self._is_due = True

    def finish(self) -> bool:
        """Wait for an update that was started, and bring its weights to the device; False where none is due.

        Raises:
            StorageError: a file could not be read or written, or is damaged.
        """
        self.join()
        assert not self._is_shown, "an update is finished while an evaluation has its weights in the layers"
        if not self._is_due:
            return False
        for name, unit in self._units.items():
            unit.weights.set_shard(self._waiting[name])
        self._is_due = False
        return True

    def supersede(self) -> None:
        """Note that the master weights are about to be brought to the layers, instead of an update that is due.

        Within a `show` the update stays due: then `hide` brings the old weights back, and keeps those that were there.
        """
        self.join()
        self._is_due = self._is_due and self._is_shown

    def show(self) -> bool:
        """Put the updated weights into the shards, and keep those that were there; False where that is so already."""
        self.join()
        if not self._is_due or self._is_shown:
            return False
        self._exchange()
        self._is_shown = True
        return True

    def hide(self) -> None:
        """Take back what `show` did."""
        assert self._is_shown, "the layers do not show an update that is due"
        self._exchange()
        self._is_shown = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Have `old_weights` at hand, if an update is due."""
        self.join()
        with ExitStack() as stack:
            if self._is_shown:
                self._opened = self._waiting
            elif self._is_due:
                self._opened = {
                    name: stack.enter_context(unit.weights.shard_opened()) for name, unit in self._units.items()
                }
            try:
                yield
            finally:
                self._opened = {}

    @property
    def old_weights(self) -> Mapping[str, Tensor]:
        """This rank's part of the weights that training computes with while an update is due, by unit; else empty.
        Valid within `opened`."""
        return self._opened

    @contextmanager
    def restored(self) -> Iterator[Mapping[str, Tensor]]:
        """Take up an update that was due when a checkpoint was saved, whose master weights the layers have.

        The block fills the buffers it is given, by unit, with the old weights. They then are in the shards, and those
        of the master weights are due.
        """
        assert not self.is_due, "an update is due already"
        self._allocate()
        for one in self._waiting.values():
            one.zero_()  # what pads a unit is in no checkpoint
        yield self._waiting
        self._exchange()
        self._is_due = True

    def _allocate(self) -> None:
        for name, unit in self._units.items():
            if name not in self._waiting:
                dtype, length = unit.options.param_dtype, unit.own.length
                self._waiting[name] = empty_on_host(length * dtype.itemsize, self._device).view(dtype)
                room = empty_on_host(length * torch.float32.itemsize, self._device)
                self._gradients[name] = room.view(torch.float32)

    def _exchange(self) -> None:
        for name, unit in self._units.items():
            unit.weights.exchange_shard(self._waiting[name])
