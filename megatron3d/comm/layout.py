"""Layout: which ranks work together, and for what, as arithmetic.

The rank numbers follow Megatron-LM's order: tensor fastest, then context, data, pipeline. Ranks of one tensor group
are therefore neighbours and share a node's fast links, and pipeline neighbours lie furthest apart. Experts have a grid
of their own over the same ranks: expert tensor fastest, then expert, expert data, pipeline. Both grids cut a pipeline
stage's ranks, so ETP x EP x EDP = TP x CP x DP, and EP is not bounded by DP.

`AXES` says what ranks do together. An axis is named by its use: who reads which samples (`batch`) is another question
than who sums gradients (`grad`). Nothing here knows of processes or devices; `mesh.py` turns a layout into groups.

Source: Liu et al. 2025 (MoE Parallel Folding) for the second grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Literal

from megatron3d.errors import ConfigError

GRID = ("tp", "cp", "dp", "pp")  # fastest first
EXPERT_GRID = ("etp", "ep", "edp", "pp")

Cut = Literal["whole", "runs", "strides", "ends"]


@dataclass(frozen=True)
class AxisRule:
    """Which ranks form the groups of an axis.

    Attributes:
        use: what the ranks of a group do together.
        along: the coordinates of one grid along which they differ, fastest first.
        cut: "whole", or the part of such a line that is a group: "runs" of consecutive ranks, "strides" of one rank
            from each run, or the two "ends", with every rank between them alone.
        run: the attribute of `Layout` with the length of a run.
    """

    use: str
    along: tuple[str, ...]
    cut: Cut = "whole"
    run: str = ""


AXES: Mapping[str, AxisRule] = MappingProxyType(
    {
        "tp": AxisRule("shard each layer", ("tp",)),
        "kv": AxisRule("use the same key and value heads", ("tp",), "runs", "kv_copies"),
        "cp": AxisRule("shard each sample", ("cp",)),
        "cp_heads": AxisRule("exchange heads of attention within a2a+p2p", ("cp",), "runs", "cp_heads"),
        "cp_ring": AxisRule("pass keys and values round within a2a+p2p", ("cp",), "strides", "cp_heads"),
        "pp": AxisRule("hold the stages of one pipeline", ("pp",)),
        "batch": AxisRule("read different samples", ("dp",)),
        "grad": AxisRule("hold the same parameters and sum their gradients", ("cp", "dp")),
        "shard": AxisRule("shard the state of these parameters", ("cp", "dp"), "runs", "shard_size"),
        "gather": AxisRule("gather what is sharded of the weights", ("cp", "dp"), "runs", "shard_size"),
        "replica": AxisRule("own the same shard of it", ("cp", "dp"), "strides", "shard_size"),
        "expert_tp": AxisRule("shard each expert", ("etp",)),
        "expert": AxisRule("hold different experts", ("ep",)),
        "expert_grad": AxisRule("hold the same experts and sum their gradients", ("edp",)),
        "expert_shard": AxisRule("shard the state of these experts", ("edp",), "runs", "expert_shard_size"),
        "expert_gather": AxisRule("gather what is sharded of them", ("edp",), "runs", "expert_shard_size"),
        "expert_replica": AxisRule("own the same shard of it", ("edp",), "strides", "expert_shard_size"),
        "tied": AxisRule("hold the table that both ends of a pipeline use", ("pp",), "ends"),
        "world": AxisRule("run together", GRID),
    }
)


@dataclass(frozen=True)
class Layout:
    """Degrees of tensor, pipeline, data, context, expert and expert-tensor parallelism.

    Attributes:
        etp: tensor-parallel ranks of an expert; None is `tp`.
        zero_shard: consecutive ranks of the `grad` axis that shard ZeRO's state; None is all of them.
        kv_copies: consecutive tensor-parallel ranks that use the same key and value heads: more than 1 where `tp` is
            larger than their number.
        cp_heads: consecutive context-parallel ranks that exchange heads in layers of kind a2a+p2p.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    zero_shard: int | None = None
    kv_copies: int = 1
    cp_heads: int = 1

    def __post_init__(self) -> None:
        degrees = {"tp": self.tp, "pp": self.pp, "dp": self.dp, "cp": self.cp, "ep": self.ep, "etp": self.expert_tp}
        for name, degree in degrees.items():
            if degree < 1:
                raise ConfigError(f"the {name} degree of a layout must be at least 1, not {degree}")
        if self.shard_size < 1 or self.grad_size % self.shard_size:
            raise ConfigError(
                f"--zero-shard-size {self.zero_shard} does not cut the {self.grad_size} data-parallel ranks into equal "
                "groups"
            )
        if self.kv_copies < 1 or self.tp % self.kv_copies:
            raise ConfigError(
                f"{self.kv_copies} copies of each key and value head do not fit on {self.tp} tensor-parallel ranks"
            )
        if self.cp_heads < 1 or self.cp % self.cp_heads:
            raise ConfigError(
                f"{self.cp_heads} ranks that exchange heads do not divide {self.cp} context-parallel ranks"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        ranks, each = self.tp * self.grad_size, self.expert_tp * self.ep
        if ranks % each:
            raise ConfigError(
                f"expert tensor {self.expert_tp} x expert {self.ep} = {each} does not divide the tensor {self.tp} x "
                f"context {self.cp} x data {self.dp} = {ranks} ranks of a pipeline stage, which hold the experts; "
                "change --expert-model-parallel-size or --expert-tensor-parallel-size"
            )
        block = self.tp * self.shard_size
        if block % each and each % block:
            raise ConfigError(
                f"--zero-shard-size {self.shard_size} x tensor {self.tp} = {block} consecutive ranks are no whole "
                f"number of the {each} ranks (expert tensor {self.expert_tp} x expert {self.ep}) that hold all "
                "experts once, nor a part of them; choose sizes of which one divides the other"
            )

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel ranks of an expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def grad_size(self) -> int:
        """Ranks that hold the same parameters, experts aside, and sum their gradients."""
        return self.cp * self.dp

    @property
    def shard_size(self) -> int:
        """Consecutive ranks of the `grad` axis that shard ZeRO's state."""
        return self.grad_size if self.zero_shard is None else self.zero_shard

    @property
    def expert_shard_size(self) -> int:
        """Ranks that shard the state of the same experts: those among the consecutive ranks that `shard_size` joins,
        so that their traffic crosses the same links."""
        return max(1, self.tp * self.shard_size // (self.expert_tp * self.ep))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.degree(name) for name in GRID)

    def degree(self, coordinate: str) -> int:
        """Number of positions along a coordinate of either grid."""
        experts = self.expert_tp, self.ep, self.tp * self.grad_size // (self.expert_tp * self.ep)
        degrees = (self.tp, self.cp, self.dp, self.pp, *experts, self.pp)
        return dict[str, int](zip((*GRID, *EXPERT_GRID), degrees))[coordinate]

    def size(self, axis: str) -> int:
        """Number of ranks in a group of an axis, the largest where they differ."""
        rule = AXES[axis]
        ranks = prod(self.degree(name) for name in rule.along)
        return {"whole": ranks, "runs": self._run(rule), "strides": ranks // self._run(rule), "ends": min(2, ranks)}[
            rule.cut
        ]

    def _run(self, rule: AxisRule) -> int:
        return {
            "": 1,
            "kv_copies": self.kv_copies,
            "cp_heads": self.cp_heads,
            "shard_size": self.shard_size,
            "expert_shard_size": self.expert_shard_size,
        }[rule.run]

    def coordinates(self, rank: int, grid: tuple[str, ...] = GRID) -> dict[str, int]:
        """Position of a rank along every coordinate of a grid."""
        position = {}
        for name in grid:
            rank, position[name] = divmod(rank, self.degree(name))
        return position

    def rank_at(self, grid: tuple[str, ...] = GRID, /, **coordinates: int) -> int:
        """The rank at a position of a grid; coordinates left out are 0."""
        rank, stride = 0, 1
        for name in grid:
            rank += coordinates.get(name, 0) * stride
            stride *= self.degree(name)
        return rank

    def ranks_along(self, axis: str, rank: int) -> tuple[int, ...]:
        """The group of an axis that a rank belongs to, in order."""
        rule = AXES[axis]
        line = self._line(rule.along, rank)
        at, run = line.index(rank), self._run(rule)
        if rule.cut == "runs":
            return line[at - at % run :][:run]
        if rule.cut == "strides":
            return line[at % run :: run]
        if rule.cut == "ends":
            return (rank,) if 0 < at < len(line) - 1 else tuple(dict.fromkeys((line[0], line[-1])))
        return line

    def _line(self, along: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """All ranks that differ from `rank` along these coordinates alone, in order."""
        grid = GRID if set(along) <= set(GRID) else EXPERT_GRID
        here = self.coordinates(rank, grid)
        ranks = [self.rank_at(grid, **{**here, **dict.fromkeys(along, 0)})]
        for name in along:
            stride = self.rank_at(grid, **{name: 1})
            ranks = [first + i * stride for i in range(self.degree(name)) for first in ranks]
        return tuple(ranks)

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Every group of an axis; together they hold each rank once."""
        groups: list[tuple[int, ...]] = []
        seen: set[int] = set()
        for rank in range(self.world_size):
            if rank not in seen:
                groups.append(self.ranks_along(axis, rank))
                seen.update(groups[-1])
        return groups

    def __str__(self) -> str:
        named = [f"TP{self.tp}", f"PP{self.pp}", f"DP{self.dp}"] + [f"CP{self.cp}"] * (self.cp > 1)
        experts = [f"EP{self.ep}"] * (self.ep > 1) + [f"ETP{self.etp}"] * (self.expert_tp != self.tp)
        return " x ".join(named + experts)
