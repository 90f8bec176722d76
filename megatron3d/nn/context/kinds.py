"""How the ranks that share a sample attend to each other's keys: the kinds of `--cp-comm-type`.

A kind is made for a layer and called with the queries, keys and values of this rank's tokens, projected and rotated.
It returns what attention gives for these queries over all keys of their samples.

Shapes: B micro-batch, N query heads, G key and value heads (N and G are this rank's), L positions of this rank, D head
size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from megatron3d.nn.context.exchange import AXES_OF_KIND, ExchangeAttention
from megatron3d.nn.context.gathered import AllGatherAttention
from megatron3d.nn.inputs import LayerInputs
from megatron3d.tensor.context import LayerContext


class ContextAttention(Protocol):
    """Attention over samples of which each rank has some positions."""

    def __call__(self, q_BNLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, inputs: LayerInputs, /) -> Tensor:
        """[B, N, L, D]; `inputs` have the shards of the micro-batch."""
        ...


KINDS: Mapping[str, Callable[[LayerContext], ContextAttention]] = MappingProxyType(
    {"allgather": AllGatherAttention} | {kind: partial(ExchangeAttention, kind=kind) for kind in AXES_OF_KIND}
)
"""The kinds by their names: each makes the attention of a layer from its context."""


def context_attention(context: LayerContext, *, layer: int) -> ContextAttention | None:
    """What a layer attends with where its samples are cut; None where they are whole."""
    return None if context.cp.size == 1 else KINDS[context.exchange.kind_of(layer)](context)
