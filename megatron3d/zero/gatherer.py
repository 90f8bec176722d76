"""Gathering: when the weights of which unit come and go, behind the gate that a model's stages open and close.

With ZeRO-3 a unit's weights are gathered when a place asks for them and freed when it is done with them; the gathers
of the places that come next are started beforehand, in the order of the forward, or against it in a backward. At the
other stages weights stay, and a place only waits until the last update has reached them.

Two things make a plain count of users wrong, so a unit is either *kept* for a running backward or not. A recomputed
forward opens and closes its places inside the backward of the same places. And it stops as soon as it has made what
the backward lacks, so its last place is opened and never closed.

Source: Rajbhandari et al. 2020 (ZeRO), section 7.2; Rajbhandari et al. 2021 (ZeRO-Infinity), section 6.2 (prefetch).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from megatron3d.params.gate import WeightUse
from megatron3d.params.row_blocks import BlockedTable
from megatron3d.zero.buffers import WeightBuffer

Places = Mapping[int, Mapping[str, WeightUse]]  # by stage, in the order of its forward


class UnitGatherer:
    """The gatherer of one rank's weights.

    Args:
        weights: buffers by unit.
        places: what each stage of this rank uses where.
        releases: whether weights are freed after use.
        prefetch: number of places whose gathers are started ahead.
        tables: parameters whose weights come in blocks, within the places that use them.
    """

    def __init__(
        self,
        weights: Mapping[str, WeightBuffer],
        places: Places,
        *,
        releases: bool,
        prefetch: int,
        tables: Mapping[nn.Parameter, BlockedTable] | None = None,
    ) -> None:
        self.releases = releases
        self._tables = dict(tables or {})
        self._weights, self._places, self._prefetch = dict(weights), places, prefetch
        self._where = {name: (stage, i) for stage, known in places.items() for i, name in enumerate(known)}
        self._kept: set[str] = set()
        self._is_in_backward = False

    def gather_weights(self, place: str, *, backward: bool) -> None:
        """Bring the weights of a place here, and start bringing those of the next ones."""
        stage, index = self._where[place]
        here, *ahead = self._next_places(stage, index, backward=backward)
        for one in (here, *(() if self._is_recomputing(backward) else ahead)):
            for name in one.backward if backward else one.forward:
                self._weights[name].start_gather()
                if backward:
                    self._kept.add(name)
        for name in here.backward if backward else here.forward:
            self._weights[name].finish_gather()

    def release_weights(self, place: str, *, backward: bool) -> None:
        """Free the weights of a place, but for those that a backward under way still needs."""
        stage, _ = self._where[place]
        there = self._places[stage][place]
        if backward:
            self._kept.difference_update(there.backward)
        for name in there.backward if backward else there.forward:
            if name not in self._kept:
                self._weights[name].free()

    def blocks_of(self, table: nn.Parameter) -> BlockedTable | None:
        """The weights of a table that is cut into blocks; None of one that is not."""
        return self._tables.get(table)

    def begin_backward(self) -> None:
        """A backward of some stage begins."""
        self._is_in_backward = True

    def end_backward(self, stage: int) -> None:
        """The backward of a stage is over: nothing of it is needed any more."""
        self._is_in_backward = False
        self._kept.clear()
        for place in self._places.get(stage, {}).values():
            for name in place.forward:
                self._weights[name].free()

    def _next_places(self, stage: int, index: int, *, backward: bool) -> list[WeightUse]:
        """The place itself and the next `prefetch` ones in the order in which they are used."""
        known = list(self._places[stage].values())
        if backward:
            return known[max(0, index - self._prefetch) : index + 1][::-1]
        return known[index : index + 1 + self._prefetch]

    def _is_recomputing(self, backward: bool) -> bool:
        """Whether this is a forward inside a backward, whose next places the backward itself prefetches."""
        return self._is_in_backward and not backward
