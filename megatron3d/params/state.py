"""Declared state: tensors beside the parameters that are saved, resharded and updated once a step, without a gradient.

There are two kinds, both declared by `ParallelModule.declare_state`:

- state *of a module*: what its layers read, such as the bias of a router or the scale of an 8-bit format. It is a
  buffer of the module, alike on all data-parallel ranks, and belongs to the model: whatever loads weights loads it too.
  After a step the module's `update_state` changes it, by what the step has counted (`declare_total`).
- state *beside a parameter*: an element for each element of a parameter, such as an average of its values. It lies as
  the master weights do, sharded by ZeRO, and belongs to the state of training, as the moments of an optimizer do.

A total is counted in the backward of an identity: each micro-batch of a training step counts once, recomputed or not
and in whichever order a schedule runs the stages, and one of an evaluation never.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron3d.params.spec import ParamSpec

Reduction = Literal["sum", "max"]
TOTAL_DTYPE = torch.float64  # counts of a step are whole numbers that may be larger than 2**24


@dataclass(frozen=True)
class StateSpec:
    """One declared state.

    Attributes:
        cut: full shape, first values and the dimension that the tensor-parallel ranks shard, as of a parameter; of
            state beside a parameter the spec of that.
        dtype: of the values, in memory and in checkpoints.
        beside: local name of the parameter that it is beside; empty for state of the module.
        kind: of state beside a parameter what it is, such as "average".
        may_be_missing: whether a checkpoint may lack it, as that of a model which was converted; then it keeps its
            first values.
    """

    cut: ParamSpec
    dtype: torch.dtype
    beside: str = ""
    kind: str = ""
    may_be_missing: bool = False


@dataclass(frozen=True)
class TotalSpec:
    """What the layers of a module count in a step: how micro-batches and ranks combine, and whether the tensor-parallel
    ranks count different things (other tokens), so that theirs combine too."""

    reduction: Reduction
    is_partial: bool


def combine(total: Tensor, values: Tensor, reduction: Reduction) -> None:
    """Combine `values` with a total of their shape, in place."""
    values = values.to(total.dtype)
    if reduction == "sum":
        total.add_(values)
    else:
        torch.maximum(total, values, out=total)


def on_gradient(x: Tensor, action: Callable[[], None]) -> Tensor:
    """`x` as it is; `action` is called when its gradient comes."""
    return _OnGradient.apply(x, action)


class _OnGradient(torch.autograd.Function):
    """The identity, with an action in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        action, ctx.action = ctx.action, None  # which may hold tensors, and a backward comes once
        action()
        return grad, None
