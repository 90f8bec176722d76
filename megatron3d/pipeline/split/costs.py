"""A split by what layers cost, formula or measured: the one whose slowest stage is as fast as any split allows.

A pipeline is as slow as its slowest stage, and the output layer of a large vocabulary can cost as much as several
transformer layers, so equal numbers of layers are not equal work.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron3d.errors import ConfigError


def split_by_costs(
    layer_costs: Sequence[float], embedding_cost: float, head_cost: float, num_stages: int
) -> tuple[range, ...]:
    """The layer numbers of each stage, in order, such that the costliest stage costs as little as possible.

    Among the splits for which this holds, the one with the least sum of squared stage costs is taken, and among equal
    ones that with fewer layers on the earlier stages, which keep more microbatches alive. Every stage has a layer; only
    the first may have none if the embedding costs something, and the last if the head does.

    Args:
        layer_costs: of each transformer layer, in any unit.
        embedding_cost: what the first stage has besides its layers, in the same unit.
        head_cost: what the last stage has besides its layers: output layer and loss.
        num_stages: pipeline ranks times stages per rank.

    Raises:
        ConfigError: if a cost is not a number from 0, or there are too few layers for the stages.

    Exact: both passes are dynamic programmes over (stages, layers); the first takes
    num_stages * num_layers * log(num_layers) operations.
    """
    _check(layer_costs, embedding_cost, head_cost, num_stages)
    work = _Work(tuple(accumulate(layer_costs, initial=0.0)), embedding_cost, head_cost, num_stages)
    bounds = _most_even(work, _least_maximum(work))
    return tuple(range(start, end) for start, end in pairwise(bounds))


def stage_loads(
    split: Sequence[range], layer_costs: Sequence[float], embedding_cost: float, head_cost: float
) -> tuple[float, ...]:
    """What each stage of a split costs, the ends with embedding and head."""
    loads = [sum(layer_costs[layer] for layer in layers) for layers in split]
    loads[0] += embedding_cost
    loads[-1] += head_cost
    return tuple(loads)


@dataclass(frozen=True)
class _Work:
    """Costs as sums from the start, so that any range costs one subtraction."""

    sums: tuple[float, ...]
    embedding: float
    head: float
    num_stages: int

    @property
    def num_layers(self) -> int:
        return len(self.sums) - 1

    def of(self, stage: int, start: int, end: int) -> float:
        """What `stage` costs with layers start .. end - 1."""
        ends = (self.embedding if stage == 0 else 0.0) + (self.head if stage == self.num_stages - 1 else 0.0)
        return self.sums[end] - self.sums[start] + ends

    def least_layers(self, stage: int) -> int:
        """How many layers `stage` must have."""
        has_other_work = (stage == 0 and self.embedding > 0) or (stage == self.num_stages - 1 and self.head > 0)
        return 0 if has_other_work else 1


def _least_maximum(work: _Work) -> float:
    """The cost of the costliest stage in the best split.

    best[end] is that cost for the stages so far with the first `end` layers. In `start`, the earlier stages' cost
    rises and the new stage's falls, so their maximum is least where they cross: found by bisection.
    """
    infinity = float("inf")
    first = work.least_layers(0)
    best = [work.of(0, 0, end) if end >= first else infinity for end in range(work.num_layers + 1)]
    fewest = first
    for stage in range(1, work.num_stages):
        earlier, lowest, least = best, fewest, work.least_layers(stage)
        fewest = lowest + least
        best = [infinity] * (work.num_layers + 1)
        for end in range(fewest, work.num_layers + 1):
            starts = range(lowest, end - least + 1)
            crossing = bisect_left(starts, True, key=lambda start: earlier[start] >= work.of(stage, start, end))
            near = [start for start in (lowest + crossing - 1, lowest + crossing) if start in starts]
            best[end] = min(max(earlier[start], work.of(stage, start, end)) for start in near)
    return best[work.num_layers]


def _most_even(work: _Work, limit: float) -> list[int]:
    """Boundaries of the split with no stage over `limit` and the least sum of squares.

    Stages are taken from the last to the first, so that among equals the earlier ones come out smaller.
    """
    last = work.num_stages - 1
    best: dict[int, tuple[float, int]] = {work.num_layers: (0.0, work.num_layers)}  # start -> (squares, end)
    steps = []
    for stage in range(last, -1, -1):
        reached: dict[int, tuple[float, int]] = {}
        for end, (squares, _) in sorted(best.items()):
            for start in range(end - work.least_layers(stage), -1, -1):
                cost = work.of(stage, start, end)
                if cost > limit:
                    break
                total = squares + cost * cost
                if start not in reached or total < reached[start][0]:
                    reached[start] = (total, end)
        steps.append(reached)
        best = reached
    bounds = [0]
    for reached in reversed(steps):
        bounds.append(reached[bounds[-1]][1])
    return bounds


def _check(layer_costs: Sequence[float], embedding_cost: float, head_cost: float, num_stages: int) -> None:
    """Costs are numbers from 0, and there is work for every stage."""
    for what, cost in (("embedding", embedding_cost), ("head", head_cost), *enumerate(layer_costs)):
        if not 0 <= cost < float("inf"):
            name = f"layer {what}" if isinstance(what, int) else f"the {what}"
            raise ConfigError(f"the cost of {name} is {cost}; give a finite number from 0")
    if num_stages < 1 or not layer_costs:
        raise ConfigError(
            f"{len(layer_costs)} layers cannot be split over {num_stages} stages; give at least 1 of each"
        )
    ends = (embedding_cost > 0) + (head_cost > 0)
    if len(layer_costs) < num_stages - min(ends, num_stages):
        raise ConfigError(
            f"--num-layers {len(layer_costs)} cannot fill {num_stages} pipeline stages, of which {ends} may do without "
            "layers; use fewer stages or more layers"
        )
