"""Do all ranks that hold the same values hold the same bits? A hash of everything that is held more than once.

What several ranks hold is meant to stay equal without ever being sent again: weights and optimizer state of
data-parallel replicas, parameters that tensor parallelism does not cut, and the copies of a tied table. A flipped bit
in one of them makes ranks train different models, and no loss shows it. So each rank hashes its bits, and the ranks of
each axis compare hashes: one small all-gather per axis.

The hash reads the bits as 64-bit words, multiplies each by an odd weight and sums the products modulo 2**64. An odd
weight has an inverse, so a change within a single word always changes the sum. Integer addition is exact, so the order
of the sum does not matter, and each device hashes its own values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron3d.comm.collectives import all_gather, all_reduce, gather_values
from megatron3d.comm.mesh import Axis, Mesh
from megatron3d.errors import NumericsError
from megatron3d.params.boxes import ShardView
from megatron3d.zero.unit import WeightUnit

_CHUNK = 1 << 16  # words hashed at once: where their products are stored, that is a few buffers of half a MiB
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 over the golden ratio, as a signed number
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORD_BYTES = 8
_SHOWN = 3


@dataclass(frozen=True)
class _Held:
    """Values of one parameter on this rank: their name in messages, the parameter's unit, whether tensor ranks hold
    them alike, and the axis of its kind on which all ranks do."""

    name: str
    unit: WeightUnit
    is_alike_on_tp: bool
    axis: Axis
    data: Tensor

    @property
    def is_held_elsewhere(self) -> bool:
        """Whether another rank must hold the same, so that a hash has something to be compared with."""
        on_tp = self.is_alike_on_tp and self.unit.axes.tensor.size > 1
        return self.axis.size > 1 or on_tp or (self.unit.tied is not None and self.unit.tied.size > 1)


def require_equal_replicas(
    units: Mapping[str, WeightUnit],
    states: Mapping[str, ShardView],
    mesh: Mesh,
    *,
    step: int,
    others: Sequence[tuple[Axis, Mapping[str, Tensor]]] = (),
) -> None:
    """Compare all values that several ranks hold; collective over all ranks, which decide together.

    Args:
        units: the units of this rank, whose weights have arrived (`ZeroEngine.finish_publish`).
        states: master weights and optimizer states, copies of tied tables too, by "kind/parameter name".
        mesh: the axes on which the ranks compare.
        step: number of the step after which this is, for the message.
        others: further values by name, with an axis all of whose ranks hold the same.

    Raises:
        NumericsError: ranks that must hold equal values do not; it names the parameters and the ranks.
    """
    device = next(iter(units.values())).options.device
    held = [one for one in (*_weights(units), *_states(units, states)) if one.is_held_elsewhere]
    weights = odd_weights(_CHUNK, device)
    hashes = {one.name: bit_hash(one.data, weights) for one in held}
    problems = []
    for axis in _distinct(one.axis for one in held):
        problems += _differences([one for one in held if one.axis.name == axis.name], hashes, axis)
    for axis in _distinct(one.unit.axes.tensor for one in held if one.is_alike_on_tp):
        alike = [one for one in held if one.is_alike_on_tp and one.unit.axes.tensor.name == axis.name]
        problems += _differences(alike, hashes, axis)
    problems += _differences([one for one in held if one.unit.tied is not None], hashes, mesh.tied)
    for axis, values in others:
        found = {name: bit_hash(value.flatten(), weights) for name, value in values.items()}
        problems += _unequal(sorted(found), found, axis)
    _raise_together(problems, mesh, step=step, device=device)


def _weights(units: Mapping[str, WeightUnit]) -> Iterator[_Held]:
    """The weights that the layers read, where they stay from step to step."""
    for unit in units.values():
        for slot in unit.layout.slots if not unit.weights.is_sharded else ():
            data = unit.weights.full[slot.span.slice]
            yield _Held(f"weights/{slot.spec.name}", unit, slot.spec.is_replicated, unit.axes.grad, data)


def _states(units: Mapping[str, WeightUnit], states: Mapping[str, ShardView]) -> Iterator[_Held]:
    """What is updated and saved, of which only the replicas hold the same part; without master weights that are the
    layers' weights."""
    at = {slot.spec.name: (unit, slot.spec) for unit in units.values() for slot in unit.layout.slots}
    for name, view in states.items():
        kind, _, parameter = name.partition("/")
        unit, spec = at[parameter]
        if kind == "model" and unit.stores_layer_weights and not unit.weights.is_sharded:
            continue
        yield _Held(name, unit, spec.is_replicated, unit.axes.replica, view.data)


def _distinct(axes: Iterable[Axis]) -> list[Axis]:
    """Each axis once, in an order that all ranks share."""
    by_name = {axis.name: axis for axis in axes}
    return [by_name[name] for name in sorted(by_name)]


def odd_weights(count: int, device: torch.device) -> Tensor:
    """Pseudo-random odd 64-bit numbers, int64 [count]."""
    mixed = torch.arange(1, count + 1, device=device) * _MULTIPLIER
    return (mixed ^ (mixed >> 29)) | 1


def bit_hash(data: Tensor, weights: Tensor) -> Tensor:
    """The hash of the bits of a one-dimensional tensor, int64 []; `weights` as `odd_weights` gives them.

    Chunks are hashed alike, and then together with the squares of the weights, so that one set serves any length and
    no two places count alike.
    """
    bits = data.view(_BITS[data.itemsize])
    chunks = bits.split(weights.numel() * _WORD_BYTES // data.itemsize)
    sums = [_dot(words, weights[: words.numel()]) for words in map(_words, chunks)]
    if len(sums) == 1:
        return sums[0]
    return bit_hash(torch.stack(sums), weights * weights)


def _words(bits: Tensor) -> Tensor:
    """The same as 64-bit words, int64 [ceil(bytes / 8)]; the last is filled up with zeros."""
    per_word = _WORD_BYTES // bits.itemsize
    if bits.numel() % per_word or bits.storage_offset() % per_word:
        filled = bits.new_zeros(-(-bits.numel() // per_word) * per_word)
        filled[: bits.numel()] = bits
        bits = filled
    return bits.view(torch.int64)


def _dot(words: Tensor, weights: Tensor) -> Tensor:
    """The sum of products, int64 []; torch's, which stores no products, takes integers on a CPU alone."""
    return torch.dot(words, weights) if words.device.type == "cpu" else (words * weights).sum()


def _differences(held: list[_Held], hashes: Mapping[str, Tensor], axis: Axis) -> list[str]:
    """A clause for each of these that ranks of the axis hold with different bits; all its ranks have the same list."""
    return _unequal(sorted(one.name for one in held), hashes, axis)


def _unequal(names: list[str], hashes: Mapping[str, Tensor], axis: Axis) -> list[str]:
    if axis.size == 1 or not names:
        return []
    table = all_gather(torch.stack([hashes[name] for name in names]), axis).view(axis.size, len(names)).tolist()
    return [_clause(name, axis, found) for name, *found in zip(names, *table) if len(set(found)) > 1]


def _clause(name: str, axis: Axis, found: list[int]) -> str:
    """Which ranks hold something else than most do; of two, each is as likely to be the wrong one."""
    groups = [[rank for rank, one in zip(axis.ranks, found) if one == value] for value in dict.fromkeys(found)]
    most, *others = sorted(groups, key=len, reverse=True)
    rest = "; ".join(_ranks(ranks) for ranks in others)
    return f"{name}: {rest} against {_ranks(most)}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _raise_together(problems: list[str], mesh: Mesh, *, step: int, device: torch.device) -> None:
    count = torch.tensor(len(problems), device=device)
    if not int(all_reduce(count, mesh.world)):
        return
    every = dict.fromkeys(problem for found in gather_values(problems, mesh.world) for problem in found)
    more = f"; and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    raise NumericsError(
        f"ranks that must hold the same values hold different ones after step {step}: "
        f"{'; '.join(list(every)[:_SHOWN])}{more}. Nothing is saved of this step; start again from the latest "
        "checkpoint, and if a rank is named again, look at the memory and the device of its machine"
    )
