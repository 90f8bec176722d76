"""One row of a map between two spellings of a model: our tensor, their tensors, and how the ones lie in the other.

What two libraries disagree about is names, what is fused (we keep query, key and value in one tensor, and gate and up
projection), and which way a linear map lies (GPT-2's `Conv1D` is [in, out]). A row says these three things; a map is a
list of rows, and going there and back is one function each, without arithmetic, so that values stay bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron3d.config.sections.model import ModelConfig

# The components that a checkpoint has or lacks as a whole; only the trunk is in all of them. `tokens` predicts tokens,
# `pairs` scores two sentences, `classes` classifies a text.
Component = Literal["trunk", "pooler", "tokens", "pairs", "classes"]


@dataclass(frozen=True)
class TensorRule:
    """One tensor of ours and its counterparts.

    Attributes:
        ours: full name, as in a checkpoint behind `model/`; None where we have no such tensor and theirs is zeros.
        theirs: names there; several are the parts that ours fuses along dimension 0, in this order.
        shape: full shape of ours.
        sizes: along dimension 0, what each of theirs holds of ours.
        transposed: whether theirs lies the other way, [in, out].
        component: what of the model it belongs to.
    """

    ours: str | None
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    transposed: bool = False
    component: Component = "trunk"

    def __post_init__(self) -> None:
        """Refuse a row that does not add up."""
        if len(self.part_sizes) != len(self.theirs) or sum(self.part_sizes) != self.shape[0]:
            raise ValueError(f"{self.ours}: parts {self.part_sizes} of {self.theirs} do not make up {self.shape}")

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Sizes along dimension 0 of ours, one for each of theirs."""
        return self.sizes or (self.shape[0],)

    def shapes_there(self) -> dict[str, tuple[int, ...]]:
        """The shape that each of their tensors has."""
        shapes = [(size, *self.shape[1:]) for size in self.part_sizes]
        return {name: shape[::-1] if self.transposed else shape for name, shape in zip(self.theirs, shapes)}

    def to_ours(self, read: Callable[[str], Tensor]) -> Tensor:
        """Our tensor, contiguous and in their dtype, from a reader of theirs by name."""
        parts = [read(name).t() if self.transposed else read(name) for name in self.theirs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()

    def to_theirs(self, tensor: Tensor) -> dict[str, Tensor]:
        """Their tensors, contiguous, cut out of ours."""
        parts = tensor.split(self.part_sizes)
        return {name: (p.t() if self.transposed else p).contiguous() for name, p in zip(self.theirs, parts)}


def linear_rows(
    ours: str,
    theirs: Iterable[str],
    shape: tuple[int, int],
    *,
    bias: bool = True,
    sizes: tuple[int, ...] = (),
    transposed: bool = False,
    component: Component = "trunk",
) -> list[TensorRule]:
    """Weight [out, in] and, unless the model has none, bias [out] of a linear map."""
    names = tuple(theirs)
    rows = [TensorRule(f"{ours}.weight", tuple(f"{n}.weight" for n in names), shape, sizes, transposed, component)]
    if bias:
        rows.append(
            TensorRule(f"{ours}.bias", tuple(f"{n}.bias" for n in names), shape[:1], sizes, component=component)
        )
    return rows


def norm_rows(
    ours: str, theirs: str, size: int, *, bias: bool = True, component: Component = "trunk"
) -> list[TensorRule]:
    """Weight and, where there is one, bias of a norm."""
    parts = ("weight", "bias") if bias else ("weight",)
    return [TensorRule(f"{ours}.{part}", (f"{theirs}.{part}",), (size,), component=component) for part in parts]


def table_row(ours: str, theirs: str, num_rows: int, width: int, *, component: Component = "trunk") -> TensorRule:
    """A table [rows, width] of words, positions or token types."""
    return TensorRule(f"{ours}.weight", (f"{theirs}.weight",), (num_rows, width), component=component)


def qkv_sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Rows of query, key and value in our fused projection."""
    query, key = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    return query, key, key


def convert(rows: Iterable[TensorRule], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors (weights, or gradients of them) under our names, from theirs by name.

    Raises:
        KeyError: one of theirs is not among `values`.
    """
    return {row.ours: row.to_ours(values.__getitem__) for row in rows if row.ours is not None}
