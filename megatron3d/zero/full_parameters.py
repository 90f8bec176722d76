"""FullParameters: norms of whole parameters, and functions of whole matrices, where each rank holds only a part.

A parameter is cut over the tensor axis of its kind, and its flattened shard over the ranks that share ZeRO's state
out. A sum over a parameter is therefore a sum over both axes. A whole matrix is put together on one of these ranks by
two exchanges (first the parts of each shard, then the shards), worked on there, and its parts go back the same way; the
matrices of a step are assigned so that all ranks have about equally much to do. Ranks that hold the same part
(stage 0, replicas) repeat each other's work, bit for bit.

A step so sends and receives on each rank at most four times what the rank holds, in the dtype of the values. Matrices
travel in tiles, so that what is in memory for a while does not grow with their number (Singh et al. 2023,
arXiv:2303.06318, section 4.1, tile an elementwise step).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megatron3d.comm.collectives import all_reduce, all_to_all
from megatron3d.comm.mesh import Axis, Mesh
from megatron3d.params.owned_slice import OwnedSlice
from megatron3d.params.spec import ParamSpec
from megatron3d.zero.flat import Slot
from megatron3d.zero.kinds import KINDS, KindAxes, kind_axes
from megatron3d.zero.unit import FlatUnit, UnitOptions

# Larger tiles take fewer exchanges, of which a GPU's have the larger latency beside their bandwidth.
TILE_CPU, TILE_DEVICE = 1 << 22, 1 << 26


def tile_elements(device_type: str) -> int:
    """The most elements of the matrices that one rank works on at a time, where none is larger."""
    return TILE_CPU if device_type == "cpu" else TILE_DEVICE


@dataclass(frozen=True)
class Owner:
    """Where a matrix is worked on: positions on the axis that shards state and on the tensor axis.

    `tp_rank` is None for a matrix that the tensor ranks hold alike: each of them works on its own copy.
    """

    shard_rank: int
    tp_rank: int | None


def assign_owners(specs: Sequence[ParamSpec], *, shard: int, tp: int) -> list[Owner]:
    """Assign matrices to `shard` x `tp` ranks, the largest first, each to the rank with the least work so far.

    The work is that of products of a matrix with its own transpose: rows x columns x the smaller of the two.
    """
    work = [spec.numel * min(spec.shape) for spec in specs]
    load = dict.fromkeys([(s, t) for s in range(shard) for t in range(tp)], 0)
    owners: dict[int, Owner] = {}
    for number in sorted(range(len(specs)), key=lambda n: -work[n]):
        shard_rank, tp_rank = min(load, key=lambda place: load[place])
        is_replicated = specs[number].is_replicated
        owners[number] = Owner(shard_rank, None if is_replicated else tp_rank)
        for t in range(tp) if is_replicated else (tp_rank,):
            load[shard_rank, t] += work[number]
    return [owners[number] for number in range(len(specs))]


def tiles_of(specs: Sequence[ParamSpec], owners: Sequence[Owner], *, most: int) -> list[list[int]]:
    """The numbers of the matrices that travel together: of each owner at least one, and as many as have `most` elements
    together."""
    tiles: list[list[int]] = []
    last: dict[Owner, tuple[int, int]] = {}  # of each owner its last tile, and the elements that it has there
    for number, (spec, owner) in enumerate(zip(specs, owners, strict=True)):
        tile, elements = last.get(owner, (0, 0))
        if elements and elements + spec.numel > most:
            tile, elements = tile + 1, 0
        last[owner] = (tile, elements + spec.numel)
        if tile == len(tiles):
            tiles.append([])
        tiles[tile].append(number)
    return tiles


@dataclass(frozen=True)
class _Place:
    """A parameter of a unit, and which range of its flattened local shard each sharing rank holds."""

    owned: OwnedSlice
    ranges: tuple[slice, ...]


class FullParameters:
    """The parameters of some units, for optimizers that need them whole: `params.owned_slice.FullAccess`."""

    def __init__(self, units: Mapping[str, FlatUnit], mesh: Mesh, options: UnitOptions) -> None:
        """Args: `units` in the order that all ranks which share them have, their mesh and options."""
        self._device = options.device
        self._axes = {kind: kind_axes(kind, mesh, options.policy) for kind in KINDS}
        self._places = {name: [_place(unit, slot) for slot in unit.layout.slots] for name, unit in units.items()}
        self._stepped = tuple(self._places)

    @contextmanager
    def only(self, unit: str) -> Iterator[None]:
        """Let the steps inside concern one unit. The ranks that share it take their units in the same order."""
        before, self._stepped = self._stepped, (unit,)
        try:
            yield
        finally:
            self._stepped = before

    def owned_slices(self) -> list[OwnedSlice]:
        """This rank's part of every parameter of the units that are stepped."""
        return [place.owned for name in self._stepped for place in self._places[name]]

    def sum_over_ranks(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """Sum over the ranks that shard state and the tensor ranks; the results are where `shares` are."""
        sums, owned_slices = list(shares), self.owned_slices()
        for axes, numbers in self._by_kind(owned_slices):
            own = torch.cat([shares[number].flatten() for number in numbers])
            totals = all_reduce(all_reduce(own.to(self._device), axes.shard), axes.tensor).to(own.device)
            for number, total in zip(numbers, totals.split([shares[n].numel() for n in numbers]), strict=True):
                sums[number] = total.view_as(shares[number])
        return sums

    def _by_kind(self, owned_slices: Sequence[OwnedSlice]) -> Iterator[tuple[KindAxes, list[int]]]:
        """The kinds that occur, in an order that all ranks share: the axes of each and the numbers of its slices."""
        for kind, axes in self._axes.items():
            numbers = [number for number, owned in enumerate(owned_slices) if owned.spec.kind == kind]
            if numbers:
                yield axes, numbers

    def map_full(
        self,
        owned_slices: Sequence[OwnedSlice],
        values: Sequence[Tensor],
        function: Callable[[ParamSpec, Tensor], Tensor],
    ) -> None:
        """Put each whole tensor together on one rank, apply the function there, and bring the parts back."""
        for axes, numbers in self._by_kind(owned_slices):
            self._map_kind(axes, [owned_slices[n] for n in numbers], [values[n] for n in numbers], function)

    def _map_kind(
        self,
        axes: KindAxes,
        owned_slices: Sequence[OwnedSlice],
        values: Sequence[Tensor],
        function: Callable[[ParamSpec, Tensor], Tensor],
    ) -> None:
        by_name = {place.owned.spec.name: place for name in self._stepped for place in self._places[name]}
        places = [by_name[owned.spec.name] for owned in owned_slices]
        specs = [owned.spec for owned in owned_slices]
        owners = assign_owners(specs, shard=axes.shard.size, tp=axes.tensor.size)
        for tile in tiles_of(specs, owners, most=tile_elements(self._device.type)):
            there = [values[number].to(self._device) for number in tile]
            routes = _Routes([places[n] for n in tile], [owners[n] for n in tile], axes.shard, axes.tensor, there[0])
            for number, part in zip(tile, _mapped(routes, there, function), strict=True):
                if values[number].data_ptr() != part.data_ptr():
                    values[number].copy_(part)


def _place(unit: FlatUnit, slot: Slot) -> _Place:
    axis, start = unit.axes.shard, slot.span.start
    spans = [slot.span.intersect(unit.layout.slice_of(rank, axis.size)) for rank in range(axis.size)]
    own = spans[axis.rank]
    flat = unit.flat_parameter_of(own) if own.length else None
    owned = OwnedSlice(
        spec=slot.spec,
        tp=unit.axes.tensor.size,
        tp_rank=unit.axes.tensor.rank,
        start=own.start - start,
        stop=own.stop - start,
        flat=None if flat is None else flat.parameter,
        offset=0 if flat is None else own.start - flat.span.start,
    )
    return _Place(owned, tuple(span.shifted(-start).slice for span in spans))


@dataclass(frozen=True)
class _Routes:
    """The ways of some matrices to their owners and back; `like` has the dtype and device of what travels.

    A part is what a rank holds of a shard, a shard is flattened and what a tensor rank holds of a whole matrix. The
    results are by number in `places`. On axes of one rank everything is a view of what came in.
    """

    places: list[_Place]
    owners: list[Owner]
    shard: Axis
    tp: Axis
    like: Tensor

    def _at_shard_rank(self, rank: int) -> list[int]:
        return [number for number, owner in enumerate(self.owners) if owner.shard_rank == rank]

    def _at_tp_rank(self, rank: int) -> list[int]:
        return [number for number in self._at_shard_rank(self.shard.rank) if self.owners[number].tp_rank == rank]

    def _local_shape(self, number: int) -> tuple[int, ...]:
        return self.places[number].owned.spec.local_shape(self.tp.size)

    def shards_of(self, values: Sequence[Tensor]) -> dict[int, Tensor]:
        """Parts to shards, on the sharing rank of their owners."""
        mine = self._at_shard_rank(self.shard.rank)
        outgoing = [[values[number] for number in self._at_shard_rank(to)] for to in range(self.shard.size)]
        lengths = [[_length(self.places[number].ranges[at]) for number in mine] for at in range(self.shard.size)]
        arrived = _exchange(outgoing, lengths, self.shard, self.like)
        return {number: _joined([parts[i] for parts in arrived]) for i, number in enumerate(mine)}

    def parts_of(self, shards: Mapping[int, Tensor]) -> list[Tensor]:
        """Shards on the sharing rank of their owners to parts."""
        mine, rank = self._at_shard_rank(self.shard.rank), self.shard.rank
        outgoing = [[shards[n][self.places[n].ranges[to]] for n in mine] for to in range(self.shard.size)]
        sources = [self._at_shard_rank(source) for source in range(self.shard.size)]
        lengths = [[_length(self.places[number].ranges[rank]) for number in numbers] for numbers in sources]
        arrived = _exchange(outgoing, lengths, self.shard, self.like)
        parts = {n: part for ns, got in zip(sources, arrived, strict=True) for n, part in zip(ns, got, strict=True)}
        return [parts[number] for number in range(len(self.places))]

    def gather_full(self, shards: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Shards to whole matrices, on the tensor rank of their owners."""
        full_tensors = {n: shards[n].view(self._local_shape(n)) for n in shards if self.owners[n].tp_rank is None}
        mine = self._at_tp_rank(self.tp.rank)
        outgoing = [[shards[number] for number in self._at_tp_rank(to)] for to in range(self.tp.size)]
        lengths = [[prod(self._local_shape(number)) for number in mine]] * self.tp.size
        arrived = _exchange(outgoing, lengths, self.tp, self.like)
        for i, number in enumerate(mine):
            spec, shape = self.places[number].owned.spec, self._local_shape(number)
            full_tensors[number] = _assembled(spec, [got[i].view(shape) for got in arrived])
        return full_tensors

    def shards_back(self, full_tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Whole matrices on the tensor rank of their owners to shards."""
        shards = {n: full_tensors[n].flatten() for n in full_tensors if self.owners[n].tp_rank is None}
        mine = self._at_tp_rank(self.tp.rank)
        outgoing = [
            [self._shard_for(to, number, full_tensors[number]) for number in mine] for to in range(self.tp.size)
        ]
        sources = [self._at_tp_rank(source) for source in range(self.tp.size)]
        lengths = [[prod(self._local_shape(number)) for number in numbers] for numbers in sources]
        arrived = _exchange(outgoing, lengths, self.tp, self.like)
        for numbers, got in zip(sources, arrived, strict=True):
            shards |= dict(zip(numbers, got, strict=True))
        return shards

    def _shard_for(self, tp_rank: int, number: int, full: Tensor) -> Tensor:
        if self.tp.size == 1:
            return full.flatten()
        return self.places[number].owned.spec.take(full, self.tp.size, tp_rank).flatten()


def _mapped(routes: _Routes, parts: Sequence[Tensor], function: Callable[[ParamSpec, Tensor], Tensor]) -> list[Tensor]:
    """The parts of the function of each whole matrix."""
    full_tensors = routes.gather_full(routes.shards_of(parts))
    for number, full in full_tensors.items():
        full.copy_(function(routes.places[number].owned.spec, full))
    return routes.parts_of(routes.shards_back(full_tensors))


def _length(within: slice) -> int:
    return within.stop - within.start


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _assembled(spec: ParamSpec, shards: list[Tensor]) -> Tensor:
    """The whole matrix from its shards in order of tensor rank: the way back of `ParamSpec.take`, without padding."""
    if len(shards) == 1:
        return shards[0]
    assert spec.tp_dim is not None, f"{spec.name} is not cut over the tensor ranks"
    full = shards[0].new_empty(spec.shape)
    for tp_rank, shard in enumerate(shards):
        at = 0
        for low, high in spec.cuts(len(shards), tp_rank):
            full.narrow(spec.tp_dim, low, high - low).copy_(shard.narrow(spec.tp_dim, at, high - low))
            at += high - low
    return full


def _exchange(outgoing: list[list[Tensor]], lengths: list[list[int]], axis: Axis, like: Tensor) -> list[list[Tensor]]:
    """Send each rank of the axis its list of flat tensors; returns the lists that came, of the given lengths."""
    if axis.size == 1:
        return outgoing
    sent = torch.cat([like[:0], *(tensor for tensors in outgoing for tensor in tensors)])
    sizes = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    arrived = all_to_all(sent, axis, send=sizes, receive=[sum(one) for one in lengths])
    halves = arrived.split([sum(one) for one in lengths])
    return [list(half.split(one)) for half, one in zip(halves, lengths, strict=True)]
