"""Out of the residual stream, which is sharded along the sequence under sequence parallelism and else whole.

What a model's head needs of other ranks' positions is fetched here; the way in is `linear.to_residual`.

Shapes: S sequence (local under sequence parallelism on the way in), B micro-batch, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron3d.comm import typed
from megatron3d.tensor.context import LayerContext


def whole_sequence(x_SBH: Tensor, context: LayerContext) -> Tensor:
    """All positions, [S, B, H]: type R under sequence parallelism (each rank brings a partial gradient), else I."""
    return typed.all_gather(x_SBH, context.tp, dst="R") if context.sequence_parallel else x_SBH


def first_position(x_SBH: Tensor, context: LayerContext) -> Tensor:
    """The first position, [B, H], type I at every layout."""
    if not context.sequence_parallel:
        return x_SBH[0]
    # Only rank 0 holds it: what the others add is 0, and so is their gradient. But it must reach their blocks, whose
    # backward takes part in collectives, also where no other head asks for their positions.
    own_BH = x_SBH[0]
    first_BH = own_BH if context.tp.rank == 0 else own_BH.masked_fill(torch.ones_like(own_BH, dtype=torch.bool), 0.0)
    return typed.all_reduce(first_BH, context.tp, dst="I")
