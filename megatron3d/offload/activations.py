"""The inputs of recomputed layers between forward and backward: in host memory for a GPU, in files for a CPU.

A GPU copies them to pinned memory and back on a stream of its own. A CPU writes them to a file that has no name (see
`block_file.py`), while the layers that the input belongs to run. Room is taken as it is needed and used again from step
to step, so after the first step no store grows. `--offload-activations` says when, `nn/recompute.py` what and in which
order.

Source: Rajbhandari et al. 2021 (ZeRO-Infinity), section 5.1.2 (activation checkpoints in CPU memory or NVMe).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from megatron3d.comm.device import Copy, HostCopies, empty_on_host
from megatron3d.offload.file_store import FileStore, Transfer


class HostInputs:
    """Inputs of a GPU in pinned host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, HostCopies(device)
        self._free: dict[int, list[Tensor]] = defaultdict(list)  # by bytes
        self.host_bytes = 0

    def put(self, x: Tensor) -> _OnHost:
        """Start copying an input to the host; its memory on the device is free once the copy is made."""
        spare = self._free[x.nbytes]
        if not spare:
            self.host_bytes += x.nbytes
            spare.append(empty_on_host(x.nbytes, self._device))
        held = spare.pop()
        self._copies.start(held.view(x.dtype).view(x.shape), x.detach())
        return _OnHost(self, held, x)

    def settle(self) -> None:
        """Nothing: the stream of the copies knows what it still reads."""

    def start_fetch(self, held: Tensor, into: Tensor) -> Copy:
        """Start copying to the device, behind the copy to the host."""
        return self._copies.start(into, held.view(into.dtype).view(into.shape))

    def release(self, held: Tensor) -> None:
        """The memory may be used for another input."""
        self._free[held.nbytes].append(held)


class _OnHost:
    """One input in pinned memory."""

    def __init__(self, store: HostInputs, held: Tensor, x: Tensor) -> None:
        self._store, self._held, self._shape, self._dtype, self._device = store, held, x.shape, x.dtype, x.device
        self._coming: tuple[Tensor, Copy] | None = None

    def start_fetch(self) -> None:
        """Start bringing it back."""
        if self._coming is None:
            into = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._coming = into, self._store.start_fetch(self._held, into)

    def take(self) -> Tensor:
        """The input on the device."""
        self.start_fetch()
        assert self._coming is not None, "what is fetched is coming"
        x, copy = self._coming
        copy.wait()
        self._coming = None
        self._store.release(self._held)
        return x


class FileInputs:
    """Inputs of a CPU in a file.

    Args:
        directory: where its space is taken.
        label: what messages call the file.

    Raises:
        StorageError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path, label: str) -> None:
        self._store = FileStore(directory, label)
        self._free: dict[int, list[str]] = defaultdict(list)  # by bytes
        self._num_extents = 0
        self._leaving: Transfer | None = None

    @property
    def file_bytes(self) -> int:
        """Bytes of disk that are taken."""
        return self._store.size_bytes

    def put(self, x: Tensor) -> _InFile:
        """Start writing an input, when the one before is written.

        Raises:
            StorageError: the disk is full, or refused.
        """
        self.settle()
        spare = self._free[x.nbytes]
        if not spare:
            spare.append(f"input {self._num_extents}")
            self._store.reserve(spare[-1], x.nbytes)
            self._num_extents += 1
        name = spare.pop()
        self._leaving = self._store.start_write(name, x.detach().contiguous())
        return _InFile(self, name, x)

    def settle(self) -> None:
        """Return when all is written.

        Raises:
            StorageError: the disk refused.
        """
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            leaving.wait()

    def start_fetch(self, name: str, into: Tensor) -> Transfer:
        """Start reading."""
        return self._store.start_read(name, into)

    def release(self, name: str, num_bytes: int) -> None:
        """The room may be used for another input."""
        self._free[num_bytes].append(name)


class _InFile:
    """One input in a file."""

    def __init__(self, store: FileInputs, name: str, x: Tensor) -> None:
        self._store, self._name, self._shape, self._dtype, self._num_bytes = store, name, x.shape, x.dtype, x.nbytes
        self._coming: tuple[Tensor, Transfer] | None = None

    def start_fetch(self) -> None:
        """Start reading it."""
        if self._coming is None:
            into = empty_on_host(self._num_bytes, torch.device("cpu")).view(self._dtype).view(self._shape)
            self._coming = into, self._store.start_fetch(self._name, into)

    def take(self) -> Tensor:
        """The input.

        Raises:
            StorageError: the disk refused, or what was read is not what was written.
        """
        self.start_fetch()
        assert self._coming is not None, "what is fetched is coming"
        x, transfer = self._coming
        transfer.wait()
        self._coming = None
        self._store.release(self._name, self._num_bytes)
        return x
