"""Kinds of parameters, and the axes of each: which ranks shard one, which sum its gradient, which shard its state.

`ParamSpec.kind` names the kind; a unit holds parameters of one kind alone. A new kind is a row here, with its axes in
`comm.layout.AXES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron3d.comm.mesh import Axis, Mesh
from megatron3d.params.spec import ParamKind
from megatron3d.zero.policy import Policy


@dataclass(frozen=True)
class AxisNames:
    """Names in `comm.layout.AXES`.

    Attributes:
        tensor: the ranks that shard a parameter, or hold a replicated one together (`ParamSpec.tp_gradient`).
        grad: the ranks that hold the same shard and sum its gradients.
        shard, replica: how `grad` is cut where ZeRO shards state: ranks that each own a part, and those that own the
            same part.
        gather: the ranks of `shard` as they gather weights, beside the reductions of gradients of `shard`.
    """

    tensor: str
    grad: str
    shard: str
    replica: str
    gather: str


KINDS: Mapping[ParamKind, AxisNames] = MappingProxyType(
    {
        "dense": AxisNames("tp", "grad", "shard", "replica", "gather"),
        "expert": AxisNames("expert_tp", "expert_grad", "expert_shard", "expert_replica", "expert_gather"),
    }
)


@dataclass(frozen=True)
class KindAxes:
    """The axes of a kind of parameters under a policy; see `AxisNames`."""

    tensor: Axis
    grad: Axis
    shard: Axis
    replica: Axis
    gather: Axis


def kind_axes(kind: ParamKind, mesh: Mesh, policy: Policy) -> KindAxes:
    """The axes of a kind: where nothing is sharded, every rank is a shard group of its own."""
    names = KINDS[kind]
    tensor, grad = mesh.axis(names.tensor), mesh.axis(names.grad)
    if policy.shard_optimizer:
        shard, replica, gather = (mesh.axis(name) for name in (names.shard, names.replica, names.gather))
        return KindAxes(tensor, grad, shard, replica, gather)
    return KindAxes(tensor, grad, mesh.alone, grad, mesh.alone)
