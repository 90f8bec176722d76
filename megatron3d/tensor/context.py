"""What a tensor-parallel layer needs besides its shape: its axis, where its gradients go, which kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
from megatron3d_kernels.registry import Registry
from torch import Tensor

from megatron3d.comm import typed
from megatron3d.comm.collectives import own_part
from megatron3d.comm.mesh import Axis
from megatron3d.comm.meter import Meter
from megatron3d.comm.replay import Replay
from megatron3d.params.gate import WeightGate
from megatron3d.params.grads import GradSink
from megatron3d.tensor.fp8_recipe import Fp8Recipe
from megatron3d.tensor.kept_inputs import InputStore

InputType = Literal["I", "V", "local"]
Result = TypeVar("Result")


class EagerCall(Protocol):
    """Calls a function."""

    def __call__(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """function(*arguments, **named)."""
        ...


def call(function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
    """function(*arguments, **named)."""
    return function(*arguments, **named)


def _axis_of_one(name: str) -> Axis:
    return Axis(name, 1, 0, (0,), None, Meter())


@dataclass(frozen=True)
class KeyExchange:
    """How context-parallel ranks attend to each other's keys.

    Attributes:
        kinds: of each layer of the model, or one for all (`--cp-comm-type`).
        gathers_again: whether gathered keys and values are gathered again in the backward instead of being kept.
        heads: for the kind a2a+p2p, the ranks that exchange heads.
        ring: and those that pass keys and values round.
    """

    kinds: tuple[str, ...] = ("allgather",)
    gathers_again: bool = False
    heads: Axis = field(default_factory=partial(_axis_of_one, "cp_heads"))
    ring: Axis = field(default_factory=partial(_axis_of_one, "cp_ring"))

    def kind_of(self, layer: int) -> str:
        """That of one layer."""
        return self.kinds[layer if len(self.kinds) > 1 else 0]


@dataclass(frozen=True)
class LayerContext:
    """Handed to every layer at construction.

    Attributes:
        tp: the tensor-parallel axis.
        sequence_parallel: whether the residual stream is sharded along the sequence over `tp` (type V) instead of
            being the same on all its ranks (type I).
        sink: takes the weight gradients.
        kernels: picks the implementation of each kernel.
        gate: asked by a stage before and after weights are used.
        kv: the ranks of `tp` that use the same key and value head; None where each has heads of its own.
        expert: the ranks that hold different experts.
        expert_tp: the ranks that shard each expert.
        cp: the ranks that have other positions of the same samples.
        exchange: how these attend to each other's keys.
        replay: what the collectives of a forward gave, for its recomputation.
        kept_inputs: takes the inputs of recomputed layers off the device; None keeps them there.
        overlap_chunks: in how many chunks products and collectives of `tp` run beside each other (`overlap.py`); 1
            leaves both whole.
        fp8: how column- and row-parallel layers compute in fp8; None has their products in the dtype of the inputs.
        eager: calls what stays outside of compiled graphs where blocks are compiled (`--compile`): functions whose
            backward has effects or that communicate, and what depends on numbers that differ between layers or steps.
    """

    tp: Axis
    sequence_parallel: bool
    sink: GradSink
    kernels: Registry = field(default_factory=Registry)
    gate: WeightGate = field(default_factory=WeightGate)
    kv: Axis | None = None
    expert: Axis = field(default_factory=partial(_axis_of_one, "expert"))
    expert_tp: Axis = field(default_factory=partial(_axis_of_one, "expert_tp"))
    cp: Axis = field(default_factory=partial(_axis_of_one, "cp"))
    exchange: KeyExchange = field(default_factory=KeyExchange)
    replay: Replay = field(default_factory=Replay)
    kept_inputs: InputStore | None = None
    overlap_chunks: int = 1
    fp8: Fp8Recipe | None = None
    eager: EagerCall = call

    @property
    def residual_gradient(self) -> Literal["equal", "partial"]:
        """How a sum over positions of the residual stream combines over the axis, such as the gradient of a replicated
        parameter used there, or a loss."""
        return "partial" if self.sequence_parallel else "equal"

    def without_fp8(self) -> LayerContext:
        """For layers that keep the dtype of their inputs."""
        return self if self.fp8 is None else replace(self, fp8=None)

    def local_sequence(self, x: Tensor, *, dim: int = 0) -> Tensor:
        """The part of a tensor known to all ranks that belongs to this rank's positions of the residual stream."""
        return own_part(x, self.tp, dim=dim) if self.sequence_parallel else x

    def positions(self, x_SBH: Tensor, of_samples_BL: Tensor | None = None) -> Tensor:
        """Where in its sample each position of this rank's residual stream [S, B, H] stands, int64 [S, 1 or B].

        Args:
            x_SBH: of the residual stream.
            of_samples_BL: where the positions that all ranks of `tp` have together stand, [1 or B, L]; None where they
                stand one after another from the first on.
        """
        if of_samples_BL is not None:
            return self.local_sequence(of_samples_BL.t())
        count = x_SBH.shape[0]  # len() would be a fixed number in an exported graph, whose lengths are symbols
        full_length = count * self.tp.size if self.sequence_parallel else count
        return self.local_sequence(torch.arange(full_length, device=x_SBH.device)).unsqueeze(1)

    def total(self, partial: Tensor) -> Tensor:
        """P to R on `tp`: the sum of what the ranks have, each of which uses it in its own way."""
        return self.eager(typed.all_reduce, partial, self.tp, dst="R", replay=self.replay)

    def whole_heads(self, part_SBd: Tensor) -> Tensor:
        """Key and value heads, [..., D] of type R on `kv`, from the part of each that every rank of it has, [..., d] of
        type V: each rank uses its copy, so the backward sums the gradients and cuts them again."""
        if self.kv is None:
            return part_SBd
        return self.eager(typed.all_gather, part_SBd, self.kv, dst="R", dim=-1, replay=self.replay)


def unsharded_context() -> LayerContext:
    """The context of a model that is only described: all of it on one rank."""
    return LayerContext(_axis_of_one("tp"), False, GradSink())
