"""The flat buffers of one unit's weights and gradients, and every collective that moves them, as start/finish pairs.

Two axes cut the ranks that sum a gradient (`kinds.py`). The ranks of the *shard* axis each own one part of the unit;
the ranks of the *replica* axis own the same part. ZeRO over all ranks is one replica; plain data parallelism is shards
of one rank; between them lies hierarchical sharding (HSDP, MiCS). So there is one path: gradients are reduce-scattered
over the shard axis and all-reduced over the replica axis, weights are all-gathered over the shard axis.

Source: Rajbhandari et al. 2020 (ZeRO), section 5; Zhang et al. 2022 (MiCS), sections 3.2 and 3.4.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron3d.comm.collectives import (
    Pending,
    start_all_gather_into,
    start_all_reduce,
    start_reduce_scatter_into,
)
from megatron3d.comm.mesh import Axis
from megatron3d.offload.backing import StateBacking
from megatron3d.offload.stream import Waitable
from megatron3d.zero.flat import Span
from megatron3d.zero.kinds import KindAxes

# Reductions of whole-unit buffers that may be on their way at once: one that moves and one that waits behind it. More
# would keep more buffers alive, which is what sharding the gradients is to spare.
MAX_IN_FLIGHT = 2


def size_bytes(tensor: Tensor | None) -> int:
    """Bytes of a tensor's elements; 0 for None."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


class Reduction(Protocol):
    """What may be under way to the owners of gradients."""

    def finish_scatter(self) -> None:
        """Wait for it, and add what came."""
        ...


class TransientBuffers:
    """What is gathered or on its way in all units of a rank: transient bytes now and at most, and reductions."""

    def __init__(self) -> None:
        self.held_bytes = 0
        self.peak_bytes = 0
        self._in_flight: deque[Reduction] = deque()

    def take(self, num_bytes: int) -> None:
        """Count a transient buffer that is allocated (a negative number: freed)."""
        self.held_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def add_reduction(self, reduction: Reduction) -> None:
        """Note a reduction that has started, and finish the oldest ones where too many are under way."""
        if reduction in self._in_flight:
            self._in_flight.remove(reduction)  # the one of the same buffer before this one is over
        self._in_flight.append(reduction)
        while len(self._in_flight) > MAX_IN_FLIGHT:
            self._in_flight.popleft().finish_scatter()


@dataclass(frozen=True)
class WeightBacking:
    """Where a backing of weights keeps one unit's shard."""

    backing: StateBacking
    unit: str

    def start_fetch(self, into: Tensor) -> Waitable:
        """Start copying the shard to the device."""
        return self.backing.start_fetch(self.unit, into)

    def start_store(self, shard: Tensor) -> Waitable:
        """Start replacing the shard by one on the device."""
        return self.backing.start_store(self.unit, shard)

    @contextmanager
    def opened(self, *, writes: bool) -> Iterator[Tensor]:
        """The shard where it is, for the length of the block; `writes` keeps changes."""
        with self.backing.opened([self.unit], writes=writes) as records:
            (shard,) = records[self.unit].values()
            yield shard


class WeightBuffer:
    """The weights that layers read (`full`, of which parameters are views) and the part this rank owns (`shard`).

    Where parameters are sharded, `full` has memory only between `start_gather` and `free`. Its storage then grows and
    shrinks beneath the views, so modules and autograd keep the tensors they know.
    """

    def __init__(
        self,
        initial: Tensor,
        own: Span,
        axis: Axis,
        *,
        dtype: torch.dtype,
        is_sharded: bool,
        transient: TransientBuffers,
        keeps_master: bool = True,
        backing: WeightBacking | None = None,
    ) -> None:
        """Args: `initial` is fp32 and 1-D, `own` this rank's part of it, and `is_sharded` frees `full` between uses.
        Without `keeps_master` the master weights are elsewhere; with a `backing`, so is the shard of the weights."""
        self.full = initial.to(dtype)
        self.is_sharded, self._axis, self._transient = is_sharded, axis, transient
        # Gathers write through an alias that has a version counter of its own: autograd would take the return of the
        # same values for a change of what it saved.
        self._alias = self.full.data
        part = self._alias[own.slice]
        self._backing, self._own_part = backing, part
        self.shard = part.clone() if is_sharded and backing is None else part
        self.master: Tensor | None = None
        if keeps_master:
            self.master = self.shard if dtype == torch.float32 else initial[own.slice].clone()
        if backing is not None:
            assert is_sharded and not keeps_master, (
                "weights with a backing are sharded, and their master is elsewhere too"
            )
            backing.start_store(part).wait()
        self._is_here = True
        self._fetching: Waitable | None = None
        self._gathering: Pending | None = None
        if is_sharded:
            transient.take(size_bytes(self.full))

    @property
    def persistent_bytes(self) -> int:
        """Bytes that are held from step to step, without separate master weights."""
        if self._backing is not None:
            return 0
        return size_bytes(self.shard if self.is_sharded else self.full)

    @property
    def separate_master_bytes(self) -> int:
        """Bytes of master weights that are not the weights themselves."""
        return 0 if self.master is self.shard else size_bytes(self.master)

    def start_publish(self, *, is_copied: bool = False) -> None:
        """Bring the updated master weights into the shard, unless that `is_copied` already, and start bringing all
        shards into `full` if it stays."""
        self.finish_gather()
        if not is_copied and self.master is not None and self.master is not self.shard:
            self.shard.copy_(self.master)
        if not self.is_sharded:
            self._gathering = start_all_gather_into(self._alias, self.shard, self._axis)

    def set_shard(self, values: Tensor, at: Span | None = None) -> None:
        """Replace this rank's part, or the range `at` of it, by values that are on the host; `start_publish` then
        brings it to the others."""
        self.finish_gather()
        if self._backing is None:
            (self.shard if at is None else self.shard[at.slice]).copy_(values)
        else:
            self._backing.start_store(values.to(self.full.dtype)).wait()  # from host to host: no device is asked

    def exchange_shard(self, values: Tensor) -> None:
        """Exchange this rank's part and `values`, which are on the host and of its dtype; see `set_shard`."""
        self.finish_gather()
        with self.shard_opened() as shard:
            before = shard.clone()
        self.set_shard(values)
        values.copy_(before)

    @contextmanager
    def shard_opened(self, *, writes: bool = False) -> Iterator[Tensor]:
        """This rank's part, wherever it lives, for the length of the block; `writes` keeps changes."""
        if self._backing is None:
            yield self.shard
        else:
            with self._backing.opened(writes=writes) as shard:
                yield shard

    def start_gather(self) -> None:
        """Start bringing the weights here; nothing where they are here or on their way."""
        if not self._is_here:
            self._is_here = True
            self.full.untyped_storage().resize_(size_bytes(self.full))
            self._transient.take(size_bytes(self.full))
            if self._backing is None:
                self._gathering = start_all_gather_into(self._alias, self.shard, self._axis)
            else:
                self._fetching = self._backing.start_fetch(self._own_part)

    def finish_gather(self) -> None:
        """Wait until the weights may be read; weights that came from the backing are gathered now."""
        if self._fetching is not None:
            self._fetching.wait()
            self._fetching = None
            self._gathering = start_all_gather_into(self._alias, self._own_part, self._axis)
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def free(self) -> None:
        """Release the gathered weights; nothing where they stay or are gone."""
        if self.is_sharded and self._is_here:
            self.finish_gather()
            self._is_here = False
            self.full.untyped_storage().resize_(0)
            self._transient.take(-size_bytes(self.full))


class GradBuffer:
    """The gradients of one unit: `arriving` collects a whole unit's, `own` sums up this rank's part in fp32.

    Where gradients are sharded, `arriving` is taken when the first gradient of a backward comes, reduced when its last
    one came, and freed; `own` adds up over the micro-batches. Otherwise `arriving` stays and is reduced once a step,
    in place where it is fp32. A reduction in a dtype that is not fp32 lands in a buffer of that dtype.
    """

    def __init__(
        self,
        length: int,
        own: Span,
        axes: KindAxes,
        *,
        dtype: torch.dtype,
        device: torch.device,
        is_resident: bool,
        transient: TransientBuffers,
    ) -> None:
        """Args: `length` of the whole unit, `own` this rank's part of it, and `is_resident` keeps `arriving`."""
        self._length, self._own_span, self._axes = length, own, axes
        self._dtype, self._device = dtype, device
        self.is_resident, self._transient = is_resident, transient
        self._arriving = torch.zeros(length, dtype=dtype, device=device) if is_resident else None
        if self._arriving is not None and dtype == torch.float32:
            self.own = self._arriving[own.slice]
            self._is_in_place = True
        else:
            self.own = torch.zeros(own.length, device=device)
            self._is_in_place = False
        lands_apart = not is_resident and dtype != torch.float32
        self._landing = torch.empty(own.length, dtype=dtype, device=device) if lands_apart else None
        self._leaving: Tensor | None = None
        self._in_flight: Pending | None = None
        self._summing: Pending | None = None
        self._is_scattered = False
        self._is_summed = False

    @property
    def persistent_bytes(self) -> int:
        """Bytes that are held from step to step."""
        resident = size_bytes(self._arriving) if self.is_resident else 0
        return resident + size_bytes(self._landing) + (0 if self._is_in_place else size_bytes(self.own))

    @property
    def arriving(self) -> Tensor:
        """The buffer that gradients are added to; taken, with zeros, if there is none."""
        if self._arriving is None:
            self._arriving = torch.zeros(self._length, dtype=self._dtype, device=self._device)
            self._transient.take(size_bytes(self._arriving))
        return self._arriving

    def start_scatter(self) -> None:
        """Start the reduction of what has arrived, to the owners; nothing where nothing has or a resident buffer's
        only reduction has begun. Where every rank owns all, it is the sum over the replicas that starts."""
        unit_grads = self._arriving
        if unit_grads is None or self._is_scattered:
            return
        self.finish_scatter()
        if self.is_resident and self._axes.shard.size == 1:
            self._in_flight = start_all_reduce(unit_grads, self._axes.replica)
            self._is_summed = True
        else:
            into = unit_grads[self._own_span.slice] if self._landing is None else self._landing
            self._in_flight = start_reduce_scatter_into(into, unit_grads, self._axes.shard)
        if self.is_resident:
            self._is_scattered = True
        else:
            self._leaving, self._arriving = unit_grads, None
            self._transient.add_reduction(self)

    def finish_scatter(self) -> None:
        """Wait for the reduction under way, if there is one, and add what came to `own`."""
        if self._in_flight is None:
            return
        reduced = self._in_flight.wait()
        self._in_flight = None
        if not self.is_resident:
            self.own.add_(reduced)
            self._transient.take(-size_bytes(self._leaving))
            self._leaving = None
        elif not self._is_in_place:
            self.own.copy_(reduced)

    def start_replica_sum(self) -> None:
        """Start adding `own` up over the replicas, once all micro-batches are in it; does nothing a second time."""
        if not self._is_summed:
            self._summing = start_all_reduce(self.own, self._axes.replica)
            self._is_summed = True

    def finish_replica_sum(self) -> None:
        """Wait for the sum over the replicas."""
        if self._summing is not None:
            self._summing.wait()
            self._summing = None

    def clear(self) -> None:
        """Forget everything, for the next step; the first gradients to come are to overwrite a resident buffer."""
        self.finish_scatter()
        self.finish_replica_sum()
        if not self.is_resident:
            if self._arriving is not None:
                self._transient.take(-size_bytes(self._arriving))
                self._arriving = None
            self.own.zero_()
        self._is_scattered = self._is_summed = False
