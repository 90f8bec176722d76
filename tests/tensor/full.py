"""Between whole parameters and the shards of all ranks, by the specs: what dense references are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron3d.comm.collectives import gather_values
from megatron3d.comm.mesh import Axis
from megatron3d.params.module import declared_parameters
from megatron3d.params.spec import ParamSpec


def numbered(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random normal numbers that are the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fill(module: nn.Module, axis: Axis, *, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, Tensor]:
    """Give every declared parameter this rank's shard of random values, biases too, and return the whole ones.

    `scale` is their standard deviation.
    """
    wholes = {}
    for number, (name, declared) in enumerate(declared_parameters(module).items()):
        wholes[name] = (scale * numbered(*declared.spec.shape, seed=100 + number)).to(dtype)
        shard = nn.Parameter(declared.spec.take(wholes[name], axis.size, axis.rank).clone())
        declared.owner.register_parameter(declared.attribute, shard)
    return wholes


def whole_of(spec: ParamSpec, shards: list[Tensor]) -> Tensor:
    """The whole gradient from every rank's: shards put in their boxes, equal copies compared, partial sums added."""
    if spec.tp_gradient == "partial":
        return torch.stack(shards).sum(0)
    if spec.tp_gradient == "equal":
        for shard in shards[1:]:
            torch.testing.assert_close(shard, shards[0], msg=f"copies of {spec.name} differ between ranks")
        return shards[0]
    whole = torch.full(spec.shape, float("nan"), dtype=shards[0].dtype)
    for rank, shard in enumerate(shards):
        boxes, covered = spec.boxes(len(shards), rank, 0, shard.numel())
        held, padding = shard.flatten().tensor_split([covered])
        assert torch.count_nonzero(padding) == 0, f"padding of {spec.name} has a gradient on rank {rank}"
        for box, part in zip(boxes, held.split([box.numel for box in boxes]) if boxes else ()):
            whole[box.slices()] = part.view(box.size)
    return whole


def whole_gradients(module: nn.Module, axis: Axis) -> dict[str, Tensor]:
    """The whole gradient of every declared parameter, gathered from all ranks of the axis."""
    declared = declared_parameters(module)
    mine: Mapping[str, Tensor | None] = {name: one.parameter.grad for name, one in declared.items()}
    every = gather_values(mine, axis)
    return {name: whole_of(one.spec, [grads[name] for grads in every]) for name, one in declared.items()}


def assert_gradients_equal(
    module: nn.Module,
    axis: Axis,
    references: Mapping[str, Tensor],
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Compare the whole gradients with those of the dense reference's leaves, which have the same names.

    Without tolerances they are torch's for the dtype.
    """
    found = whole_gradients(module, axis)
    assert set(found) == set(references)
    for name, reference in references.items():
        message = f"gradient of {name}"
        torch.testing.assert_close(
            found[name], reference.grad, rtol=rtol, atol=atol, msg=lambda text, message=message: f"{message}: {text}"
        )
