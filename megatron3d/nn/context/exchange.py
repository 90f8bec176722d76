"""Attention over ranks that exchange heads, pass keys and values round, or both: three kinds, one path.

    p2p        all ranks form the ring, and each keeps all heads                        (`ring.py`)
    a2a        all ranks exchange heads, and a ring of one rank attends                 (`heads.py`)
    a2a+p2p    consecutive ranks exchange heads, and the ring goes over their groups

Source: Fang and Zhao 2024 (USP, arXiv:2405.07719) for the two together.

Shapes: B micro-batch, N query heads, G key and value heads, s positions of this rank, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from megatron3d.comm.mesh import Axis
from megatron3d.comm.meter import Meter
from megatron3d.comm.replay import Replay
from megatron3d.nn.context.heads import to_heads, to_positions
from megatron3d.nn.context.plan import ExchangePlan
from megatron3d.nn.context.ring import ring_attention
from megatron3d.nn.inputs import LayerInputs
from megatron3d.tensor.context import LayerContext


@dataclass(frozen=True)
class ExchangeAxes:
    """The ranks of a kind: those that exchange heads, and those that pass keys and values round."""

    heads: Axis
    ring: Axis


_ALONE = Axis("alone", 1, 0, (0,), None, Meter())

AXES_OF_KIND: Mapping[str, Callable[[LayerContext], ExchangeAxes]] = MappingProxyType(
    {
        "p2p": lambda context: ExchangeAxes(_ALONE, context.cp),
        "a2a": lambda context: ExchangeAxes(context.cp, _ALONE),
        "a2a+p2p": lambda context: ExchangeAxes(context.exchange.heads, context.exchange.ring),
    }
)


@dataclass(frozen=True)
class ExchangeAttention:
    """One of these kinds for a layer."""

    context: LayerContext
    kind: str

    def __call__(self, q_BNsD: Tensor, k_BGsD: Tensor, v_BGsD: Tensor, inputs: LayerInputs) -> Tensor:
        """[B, N, s, D]."""
        assert inputs.shards is not None, "samples that are cut come with their shards"
        axes = AXES_OF_KIND[self.kind](self.context)
        plan = inputs.shards.exchange_plan(axes.heads.size)
        return exchanged_attention(q_BNsD, k_BGsD, v_BGsD, plan, axes, replay=self.context.replay)


def exchanged_attention(
    q_BNsD: Tensor, k_BGsD: Tensor, v_BGsD: Tensor, plan: ExchangePlan, axes: ExchangeAxes, *, replay: Replay
) -> Tensor:
    """[B, N, s, D]: this rank's queries attend to the keys of all ranks, as the plan allows."""
    order_BAs = plan.order_BAs
    q_BnSD, kv_2BgSD = to_heads(q_BNsD, k_BGsD, v_BGsD, order_BAs, axes.heads, replay=replay)
    y_BnSD = ring_attention(q_BnSD, kv_2BgSD, plan.by_group, axes.ring, replay=replay)
    return to_positions(y_BnSD, order_BAs, axes.heads, replay=replay)
