"""ParamSpec: everything that is ever asked about a parameter, declared once where the parameter is made.

From the specs come local shapes, layout-independent initialisation, the parameters that decay, how gradients combine
over the tensor-parallel ranks, which copy counts in the gradient norm, checkpoint boxes and parameter counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from megatron3d.params.boxes import Box, flat_range_to_boxes

TpGradient = Literal["sharded", "equal", "partial"]
ParamKind = Literal["dense", "expert"]


@dataclass(frozen=True)
class Init:
    """How a parameter starts: "normal" with `std`, "zeros" or "ones"."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


ZEROS = Init("zeros")


@dataclass(frozen=True)
class ParamSpec:
    """One parameter, whole and cut.

    Attributes:
        name: full name, the same at every layout, such as `layers.7.attention.qkv.weight`.
        shape: full shape without any padding.
        init: how it starts.
        decays: whether weight decay applies.
        tp_dim: the dimension cut over the tensor-parallel ranks, or None for a replicated parameter.
        parts: sizes along `tp_dim` of fused parts (query, key, value; gate, up), each of which is cut by itself.
        padded_size: size along dimension 0 that is cut when the parameter is padded (vocabulary); rows from
            `shape[0]` on exist in memory but belong to no model.
        tp_gradient: what the ranks of the tensor axis hold as its gradient: their own shard, an equal copy, or a
            partial sum that must be added up.
        tied_copy: whether another stage owns this parameter and this rank keeps a copy in step with it.
        is_table: whether its rows are looked up or scored one by one (words, positions, the output projection): such
            a matrix is no linear map of hidden vectors, and Muon leaves it to another rule.
        kind: which ranks shard the parameter, sum its gradient and shard its state: the axes are `zero.kinds.KINDS`.
        trains: whether it gets gradients and updates; a frozen parameter is weights and nothing else.
    """

    name: str
    shape: tuple[int, ...]
    init: Init
    decays: bool
    tp_dim: int | None = None
    parts: tuple[int, ...] = ()
    padded_size: int | None = None
    tp_gradient: TpGradient = "equal"
    tied_copy: bool = False
    is_table: bool = False
    kind: ParamKind = "dense"
    trains: bool = True

    def __post_init__(self) -> None:
        """Refuse what no cut is defined for."""
        if self.parts and self.tp_dim != 0:
            raise ValueError(f"{self.name}: fused parts {self.parts} lie along dimension 0, not {self.tp_dim}")

    @property
    def numel(self) -> int:
        """Elements of the full parameter, without padding."""
        return prod(self.shape)

    @property
    def is_replicated(self) -> bool:
        """Whether every tensor-parallel rank holds the whole parameter."""
        return self.tp_dim is None

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is a linear map of hidden vectors."""
        return len(self.shape) == 2 and not self.is_table

    def named(self, name: str) -> ParamSpec:
        """The same spec under its full name."""
        return replace(self, name=name)

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """Shape of one rank's shard, padding included."""
        if self.tp_dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.tp_dim] = (self.padded_size or shape[self.tp_dim]) // tp
        return tuple(shape)

    def cuts(self, tp: int, tp_rank: int) -> list[tuple[int, int]]:
        """Ranges [from, to) along `tp_dim` of the full parameter that this rank holds, one for each part, unpadded."""
        if self.tp_dim is None:
            raise ValueError(f"{self.name} is not cut over the tensor-parallel ranks")
        if self.padded_size is not None:
            share = self.padded_size // tp
            low, high = (min(self.shape[0], at) for at in (share * tp_rank, share * (tp_rank + 1)))
            return [(low, high)]
        ranges, base = [], 0
        for part in self.parts or (self.shape[self.tp_dim],):
            if part % tp:
                raise ValueError(f"{self.name}: {part} along dimension {self.tp_dim} does not divide by tp {tp}")
            share = part // tp
            ranges.append((base + share * tp_rank, base + share * (tp_rank + 1)))
            base += part
        return ranges

    def take(self, full: Tensor, tp: int, tp_rank: int) -> Tensor:
        """Cut this rank's shard, in its local shape with zeros as padding, out of the full parameter."""
        if self.tp_dim is None:
            return full
        held = torch.cat(
            [full.narrow(self.tp_dim, low, high - low) for low, high in self.cuts(tp, tp_rank)], self.tp_dim
        )
        missing = self.local_shape(tp)[self.tp_dim] - held.shape[self.tp_dim]
        if missing == 0:
            return held
        return torch.cat([held, held.new_zeros((missing, *held.shape[1:]))])

    def boxes(self, tp: int, tp_rank: int, start: int, stop: int) -> tuple[tuple[Box, ...], int]:
        """Boxes of the flat range [start, stop) of this rank's shard, and how many leading elements they cover.

        Padding rows come last in a shard and lie in no box, so the boxes cover a leading part of the range.
        """
        if self.tp_dim is None:
            return tuple(flat_range_to_boxes(self.shape, start, stop)), max(0, stop - start)
        boxes: list[Box] = []
        position = 0
        for low, high in self.cuts(tp, tp_rank):
            block = list(self.shape)
            block[self.tp_dim] = high - low
            size = prod(block)
            begin, end = max(start, position) - position, min(stop, position + size) - position
            shift = tuple(low if dim == self.tp_dim else 0 for dim in range(len(block)))
            boxes += [box.shifted(shift) for box in flat_range_to_boxes(tuple(block), begin, end)]
            position += size
        return tuple(boxes), sum(box.numel for box in boxes)
