"""TransientForecast: the memory that ZeRO's stages 2 and 3 take for a while, for gradients and gathered weights.

Gradients of a unit collect in a buffer of the whole unit, which is reduced when the last has come and then waits
behind others on their way, as in `zero.buffers.TransientBuffers`. Which weights are here is asked of
`zero.gatherer.UnitGatherer` itself, over buffers that only count.

Source: Rajbhandari et al. 2020 (ZeRO), sections 5.2 and 5.3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from megatron3d.params.gate import WeightUse
from megatron3d.zero.buffers import MAX_IN_FLIGHT
from megatron3d.zero.gatherer import UnitGatherer


@dataclass(frozen=True)
class TransientUnit:
    """Bytes of one unit that come and go: its whole gradients and its whole weights, 0 where they stay.

    `scatter` is what a reduction takes for itself until it is waited for, as gloo's do; `gather` is the same of a
    gather, which is over long before anybody waits for it. `is_fetched` says that the weights come from a backing off
    the device first, and are gathered only when waited for. A table that comes in blocks has the room for its blocks
    of weights, and each of its blocks (`is_block`) has gradients, which are reduced after each contribution.
    """

    gradients: int = 0
    weights: int = 0
    scatter: int = 0
    gather: int = 0
    is_fetched: bool = False
    is_block: bool = False


@dataclass(frozen=True)
class TransientPlan:
    """What a stage shards, and how far ahead it gathers.

    Attributes:
        units: of the rank, by name.
        places: the places of the stage in the order of its forward.
        shard_gradients: whether whole gradients come and go.
        shard_weights: whether whole weights come and go.
        overlaps: whether a unit is reduced as soon as its gradients are there, instead of at the end.
        prefetch: places ahead whose weights are gathered.
        used_elsewhere: units that other stages of the rank use too, which are reduced at the end of a backward.
    """

    units: Mapping[str, TransientUnit]
    places: Mapping[str, WeightUse]
    shard_gradients: bool
    shard_weights: bool
    overlaps: bool = True
    prefetch: int = 1
    used_elsewhere: frozenset[str] = frozenset()


@dataclass(frozen=True)
class InFlight:
    """Units whose gradients are on their way, in the order in which they are waited for."""

    units: tuple[str, ...] = ()


@dataclass
class _Total:
    """Bytes held now, and the most since somebody asked."""

    held_bytes: int = 0
    highest: int = 0

    def add(self, size_bytes: int) -> None:
        self.held_bytes += size_bytes
        self.highest = max(self.highest, self.held_bytes)

    def touch(self, size_bytes: int) -> None:
        """Take and release at once."""
        self.highest = max(self.highest, self.held_bytes + size_bytes)


class _Counted:
    """A unit's weights as the gatherer knows them: here, on their way, or not."""

    def __init__(self, unit: TransientUnit, total: _Total) -> None:
        self._unit, self._total, self._is_here, self._is_moving = unit, total, False, False

    def start_gather(self) -> None:
        """They are coming."""
        if not self._is_here:
            self._is_here = self._is_moving = True
            self._total.add(self._unit.weights)
            self._total.touch(0 if self._unit.is_fetched else self._unit.gather)

    def finish_gather(self) -> None:
        """They may be read."""
        if self._is_moving:
            self._is_moving = False
            self._total.touch(self._unit.gather if self._unit.is_fetched else 0)

    def free(self) -> None:
        """They are gone."""
        if self._is_here:
            self.finish_gather()
            self._is_here = False
            self._total.add(-self._unit.weights)


class TransientForecast:
    """The transient buffers of one stage during one step; `in_flight` is what earlier steps left on its way."""

    def __init__(self, plan: TransientPlan, in_flight: InFlight | None = None) -> None:
        in_flight = in_flight or InFlight()
        self.plan = plan
        self._in_flight = list(in_flight.units)
        self._arriving: list[str] = []
        self._outstanding: Counter[str] = Counter()
        self._is_last = False
        self._total = _Total()
        self._total.add(sum(self._in_flight_bytes(name) for name in self._in_flight))
        weights = {name: _Counted(unit, self._total) for name, unit in plan.units.items() if plan.shard_weights}
        places = {0: plan.places} if plan.shard_weights else {}
        self._gatherer = UnitGatherer(cast(Any, weights), places, releases=plan.shard_weights, prefetch=plan.prefetch)

    @property
    def in_flight(self) -> InFlight:
        """What is on its way now."""
        return InFlight(tuple(self._in_flight))

    @property
    def held_bytes(self) -> int:
        """Bytes of all transient buffers now."""
        return self._total.held_bytes

    def take_highest(self) -> int:
        """The most bytes that they have been since the last call."""
        highest, self._total.highest = self._total.highest, self._total.held_bytes
        return highest

    def _in_flight_bytes(self, name: str) -> int:
        return self.plan.units[name].gradients + self.plan.units[name].scatter

    # --- Weights -------------------------------------------------------------------------------------------------

    def enter(self, place: str) -> None:
        """A forward comes to a place."""
        if self.plan.shard_weights and place:
            self._gatherer.gather_weights(place, backward=False)

    def leave(self, place: str) -> None:
        """A forward leaves it."""
        if self.plan.shard_weights and place:
            self._gatherer.release_weights(place, backward=False)

    def enter_backward(self, place: str) -> None:
        """A backward comes to a place."""
        if self.plan.shard_weights:
            self._gatherer.gather_weights(place, backward=True)

    def leave_backward(self, place: str) -> None:
        """A backward leaves it; the embedding, whose input takes no gradient, never says so."""
        if self.plan.shard_weights and place != "embedding":
            self._gatherer.release_weights(place, backward=True)

    def gather_block(self, unit: str) -> None:
        """A block of a table is gathered into the room that there is for it."""
        self._total.touch(self.plan.units[unit].gather)

    # --- Gradients -----------------------------------------------------------------------------------------------

    def begin_backward(self, contributions: Counter[str], *, is_last: bool) -> None:
        """Begin a backward that brings `contributions` gradients to each unit; `is_last` means no backward follows."""
        self._outstanding, self._is_last = Counter(contributions), is_last
        self._gatherer.begin_backward()

    def arrive(self, unit: str) -> None:
        """A gradient of a unit needs its buffer; one whose parameters are all frozen has none."""
        if unit not in self._arriving and unit in self.plan.units:
            self._arriving.append(unit)
            self._total.add(self.plan.units[unit].gradients)

    def contribute(self, unit: str, count: int) -> None:
        """So many gradients of a unit have been added to its buffer."""
        if unit not in self.plan.units:
            return
        self.arrive(unit)
        self._outstanding[unit] -= count
        waits = not self.plan.overlaps or unit in self.plan.used_elsewhere
        if self.plan.units[unit].is_block or (self._outstanding[unit] == 0 and not waits):
            self._start_reduction(unit)

    def end_backward(self) -> None:
        """The backward is over: what has not left yet leaves, and what was gathered for it is freed."""
        for unit in [name for name in self.plan.units if name in self._arriving]:
            self._start_reduction(unit)
        self._gatherer.end_backward(0)

    def _start_reduction(self, unit: str) -> None:
        """Start a reduction: of gradients that come and go after every backward, of those that stay after the last.

        It waits for an earlier one of the same unit first, and then for the oldest beyond the limit, if there is one.
        """
        self._arriving.remove(unit)
        if not self.plan.shard_gradients and not self._is_last:
            return
        if unit in self._in_flight:
            self._finish_reduction(unit)
        self._in_flight.append(unit)
        self._total.add(self.plan.units[unit].scatter)
        while self.plan.shard_gradients and len(self._in_flight) > MAX_IN_FLIGHT:
            self._finish_reduction(self._in_flight[0])

    def _finish_reduction(self, unit: str) -> None:
        self._in_flight.remove(unit)
        self._total.add(-self._in_flight_bytes(unit))
