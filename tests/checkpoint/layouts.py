"""Layouts without processes: what each rank of a layout would hold of a few parameters, for the checkpoint tests."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from megatron3d.params.boxes import ShardView
from megatron3d.params.spec import Init, ParamSpec

NORMAL = Init("normal", 0.02)

# One of each kind: padded vocabulary, fused parts, cut along 0 and 1, replicated of one and of no dimension.
SPECS = (
    ParamSpec("embedding.word.weight", (13, 6), NORMAL, decays=True, tp_dim=0, padded_size=24, tp_gradient="sharded"),
    ParamSpec("layers.0.qkv.weight", (24, 6), NORMAL, decays=True, tp_dim=0, parts=(12, 6, 6), tp_gradient="sharded"),
    ParamSpec("layers.0.fc1.bias", (12,), NORMAL, decays=False, tp_dim=0, tp_gradient="sharded"),
    ParamSpec("layers.0.fc2.weight", (6, 12), NORMAL, decays=True, tp_dim=1, tp_gradient="sharded"),
    ParamSpec("layers.0.norm.weight", (7,), Init("ones"), decays=False),
    ParamSpec("scale", (), Init("ones"), decays=False),
)


@dataclass(frozen=True)
class SmallLayout:
    """Tensor-parallel cut times flat data-parallel slices; without slices every data-parallel rank holds all."""

    tp: int
    dp: int
    sliced: bool = True

    @property
    def world_size(self) -> int:
        """Ranks of the layout; tensor-parallel ranks are neighbours."""
        return self.tp * self.dp


def full_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The value of a parameter, the same wherever it is asked for."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(map(ord, name))))


def views(
    layout: SmallLayout, rank: int, *, filled: bool, seed: int = 0, prefix: str = "model/"
) -> dict[str, ShardView]:
    """What `rank` holds under `layout`; `filled` with the true values, or with NaN to be loaded into."""
    tp_rank, dp_rank = rank % layout.tp, rank // layout.tp
    held = {}
    for spec in SPECS:
        length = prod(spec.local_shape(layout.tp))
        share = ceil(length / layout.dp)
        start, stop = (min(length, share * r) for r in (dp_rank, dp_rank + 1)) if layout.sliced else (0, length)
        boxes, covered = spec.boxes(layout.tp, tp_rank, start, stop)
        name = prefix + spec.name
        if filled:
            local = spec.take(full_tensor(name, spec.shape, seed), layout.tp, tp_rank).flatten()
            data = local[start : start + covered].clone()
        else:
            data = torch.full((covered,), float("nan"))
        held[name] = ShardView(spec.shape, boxes, data)
    return held


def merged(layout: SmallLayout, *, seed: int = 0) -> dict[str, ShardView]:
    """What all ranks of `layout` hold together, each box once, as if one process held it."""
    together: dict[str, dict] = {}
    for rank in range(layout.world_size):
        for name, view in views(layout, rank, filled=True, seed=seed).items():
            together.setdefault(name, {"shape": view.full_shape, "boxes": {}})["boxes"].update(dict(view.box_tensors()))
    return {
        name: ShardView(
            entry["shape"], tuple(entry["boxes"]), torch.cat([p.flatten() for p in entry["boxes"].values()])
        )
        for name, entry in together.items()
    }


def wrong(held: dict[str, ShardView], seed: int = 0) -> list[str]:
    """Names of the views whose buffers differ in any bit from the true values."""
    return [
        name
        for name, view in held.items()
        for box, tensor in view.box_tensors()
        if not torch.equal(tensor, full_tensor(name, view.full_shape, seed)[box.slices()])
    ]
