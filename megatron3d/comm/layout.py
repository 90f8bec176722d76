"""Layout: which rank does what, as arithmetic.

The rank numbers follow Megatron-LM's order: tensor fastest, then context, data, pipeline. Ranks of one tensor group
are therefore neighbours and share a node's fast links, and pipeline neighbours lie furthest apart.
Nothing here knows of processes or devices; `mesh.py` turns a layout into live groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron3d.errors import ConfigError

AXES = ("tp", "cp", "dp", "pp")  # fastest first


@dataclass(frozen=True)
class Layout:
    """Degrees of tensor, pipeline, data, context and expert parallelism (experts share the data ranks).

    `zero_shard` is the number of consecutive data ranks that share ZeRO's state out; None is all of them.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    zero_shard: int | None = None

    def __post_init__(self) -> None:
        for axis in (*AXES, "ep"):
            if getattr(self, axis) < 1:
                raise ConfigError(f"the {axis} degree of a layout must be at least 1, not {getattr(self, axis)}")
        if self.shard_size < 1 or self.dp % self.shard_size:
            raise ConfigError(
                f"--zero-shard-size {self.zero_shard} does not cut the {self.dp} data-parallel ranks into equal groups"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.size(axis) for axis in AXES)

    def size(self, axis: str) -> int:
        """Number of ranks along `axis` ("tp", "cp", "dp" or "pp")."""
        return {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}[axis]

    @property
    def shard_size(self) -> int:
        """Consecutive data-parallel ranks that share ZeRO's state out."""
        return self.dp if self.zero_shard is None else self.zero_shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a rank along every axis."""
        position = {}
        for axis in AXES:
            rank, position[axis] = divmod(rank, self.size(axis))
        return position

    def rank_at(self, **coordinates: int) -> int:
        """The rank at a position; axes left out are at 0."""
        rank, stride = 0, 1
        for axis in AXES:
            rank += coordinates.get(axis, 0) * stride
            stride *= self.size(axis)
        return rank

    def ranks_along(self, axis: str, rank: int) -> tuple[int, ...]:
        """All ranks that differ from `rank` along `axis` alone, in order."""
        here = self.coordinates(rank)
        return tuple(self.rank_at(**{**here, axis: i}) for i in range(self.size(axis)))

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Every group of ranks along `axis`; together they hold each rank once."""
        return sorted({self.ranks_along(axis, rank) for rank in range(self.world_size)})

    def shard_groups(self) -> list[tuple[int, ...]]:
        """Groups of consecutive data-parallel ranks that share ZeRO's state out."""
        size = self.shard_size
        return sorted(group[i : i + size] for group in self.groups("dp") for i in range(0, self.dp, size))

    def replica_groups(self) -> list[tuple[int, ...]]:
        """Groups of data-parallel ranks that own the same part of ZeRO's state, one of each shard group."""
        return sorted(group[i :: self.shard_size] for group in self.groups("dp") for i in range(self.shard_size))

    def tied_groups(self) -> list[tuple[int, ...]]:
        """Groups of the first and last pipeline rank that share the tied embedding; single ranks elsewhere."""
        if self.pp == 1:
            return [(rank,) for rank in range(self.world_size)]
        ends = [(group[0], group[-1]) for group in self.groups("pp")]
        return ends + [(rank,) for group in self.groups("pp") for rank in group[1:-1]]

    def __str__(self) -> str:
        named = [f"TP{self.tp}", f"PP{self.pp}", f"DP{self.dp}"] + [f"CP{self.cp}"] * (self.cp > 1)
        return " x ".join(named + [f"EP{self.ep}"] * (self.ep > 1))
