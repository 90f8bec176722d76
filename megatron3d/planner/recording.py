"""Recording: every allocation of a forward and its backward, in order, seen while real layers run without memory.

Tensors are fake or on the meta device, so they have storages of the right size and no bytes. A `StorageRecorder` sees
each operation, autograd's included, notes the storages that are new, and learns by weak references when a storage goes.
So nothing has to be said about what a layer saves for its backward: a storage that is saved does not go.

Two things that the CPU does are not visible in this way, and are put right here: what a kernel takes and releases
within one call (`kernel_scratch.py`), and that autograd adds gradients up in place, and hands them on without a copy,
where nobody else holds them, which it never does for tensors without memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Kind(Enum):
    """What an `Event` is."""

    ACTIVATION = "bytes that a forward keeps for its backward, allocated or, if negative, freed"
    WORK = "bytes of anything else, allocated or, if negative, freed"
    SCRATCH = "bytes that a kernel takes and releases within one call"
    ENTER = "a forward comes to a place"
    LEAVE = "a forward leaves a place"
    ENTER_BACKWARD = "a backward comes to a place"
    LEAVE_BACKWARD = "a backward leaves a place"
    GATHER_BLOCK = "a block of a table is gathered"
    ARRIVE = "a gradient of a unit needs its buffer"
    DEFERRED = "weight gradients of a unit, which were deferred, come next"
    CONTRIBUTE = "a gradient of a unit has been added to its buffer"


@dataclass(frozen=True, slots=True)
class Event:
    """One event: `size_bytes` of bytes, `name` of a place or a unit."""

    kind: Kind
    size_bytes: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class _Allocation:
    """An allocation among the events: how often events had been taken before, its position since, and itself."""

    number_of_take: int
    position: int
    event: Event


# Operations by which autograd's engine adds a gradient to one that is there, or copies one to hand it on.
_BY_THE_ENGINE = frozenset(
    {torch.ops.aten.add.Tensor, torch.ops.aten.clone.default, torch.ops.aten.new_empty_strided.default}
)


def _left_to_torch(*_: Any) -> Any:
    return NotImplemented


class StorageRecorder(TorchDispatchMode):
    """Records while it is entered; `take` gives what has been recorded since the last call.

    Args:
        scratch: bytes that the kernel of an operation takes within the call, from the operation, its arguments and its
            results.
        result_of: what an operation returns, from the operation and its arguments; NotImplemented leaves it to torch.
    """

    def __init__(
        self,
        scratch: Callable[[Any, tuple[Any, ...], Any], int],
        result_of: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any] = _left_to_torch,
    ) -> None:
        super().__init__()
        self._scratch, self._result_of = scratch, result_of
        self._events: list[Event] = []
        self._known: dict[int, weakref.ref[Any]] = {}
        self._num_taken = 0
        self._in_backward = False
        self._replaceable: tuple[int, int] | None = None  # event that an engine's copy is, and the storage it is of

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note the storages that it makes."""
        out = self._result_of(func, args, kwargs or {})
        if out is NotImplemented:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, replaces=args[0] if self._in_backward and func in _BY_THE_ENGINE else None)
        scratch = self._scratch(func, args, out)
        if scratch:
            self._events.append(Event(Kind.SCRATCH, scratch))
        return out

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave tensors that others hold out of the record."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch keeps modes out of what it compiles by a wrapper that imports the compiler, unless a mode says no."""
        return False

    def mark(self, kind: Kind, name: str) -> None:
        """Note something that is no allocation."""
        self._events.append(Event(kind, name=name))

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A backward runs within the context, and recomputed forwards inside of it, which count as its work."""
        self._in_backward = True
        yield
        self._in_backward = False

    def take(self) -> tuple[Event, ...]:
        """What has been recorded."""
        events, self._events, self._replaceable = tuple(self._events), [], None
        self._num_taken += 1
        return events

    def _see(self, tensor: Tensor, *, replaces: Tensor | None) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        kind = Kind.WORK if self._in_backward else Kind.ACTIVATION
        allocated = _Allocation(self._num_taken, len(self._events), Event(kind, size))

        def gone(_: Any) -> None:
            del self._known[key]
            self._free(key, allocated)

        self._known[key] = weakref.ref(storage, gone)
        self._events.append(allocated.event)
        self._replaceable = None
        if replaces is not None and kind is Kind.WORK and replaces.untyped_storage().nbytes() == size:
            self._replaceable = (allocated.position, id(replaces.untyped_storage()))

    def _free(self, key: int, allocated: _Allocation) -> None:
        """Note that a storage went.

        One that goes as soon as the engine has made its like was taken over instead. One that a forward made and that
        goes within it was not kept for the backward, so it was work.
        """
        if self._replaceable is not None and self._replaceable[1] == key:
            del self._events[self._replaceable[0]]
            self._replaceable = None
            return
        kind = allocated.event.kind
        if kind is Kind.ACTIVATION and allocated.number_of_take == self._num_taken:
            kind = Kind.WORK
            self._events[allocated.position] = Event(kind, allocated.event.size_bytes)
        self._events.append(Event(kind, -allocated.event.size_bytes))
