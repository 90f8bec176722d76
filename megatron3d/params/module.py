"""ParallelModule: a module whose parameters are declared, not allocated.

`declare` records a `ParamSpec` and registers a parameter on the meta device in its local shape. Nothing has memory
until `materialize` (or the flat buffers of the ZeRO room) gives it some, so a model of a trillion parameters can be
described, counted and cut on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megatron3d.params.init import initial_shard
from megatron3d.params.spec import Init, ParamKind, ParamSpec, TpGradient


class ParallelModule(nn.Module):
    """A module that owns declared parameters; `tp` is the number of ranks that share its sharded ones."""

    def __init__(self, *, tp: int = 1) -> None:
        super().__init__()
        self.tp = tp
        self.specs: dict[str, ParamSpec] = {}

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        init: Init,
        decays: bool,
        tp_dim: int | None = None,
        parts: tuple[int, ...] = (),
        padded_size: int | None = None,
        tp_gradient: TpGradient = "equal",
        tied_copy: bool = False,
        is_table: bool = False,
        kind: ParamKind = "dense",
    ) -> None:
        """Declare a parameter under a name local to this module; see `ParamSpec` for the meaning of each value."""
        if tp_dim is not None:
            tp_gradient = "sharded"
        spec = ParamSpec(name, shape, init, decays, tp_dim, parts, padded_size, tp_gradient, tied_copy, is_table, kind)
        self.specs[name] = spec
        self.register_parameter(name, nn.Parameter(torch.empty(spec.local_shape(self.tp), device="meta")))


@dataclass(frozen=True)
class Declared:
    """A declared parameter in its module: where to find it and what it is, under its full name."""

    owner: ParallelModule
    attribute: str
    spec: ParamSpec

    @property
    def parameter(self) -> nn.Parameter:
        """The live parameter; materializing replaces the object, so it is looked up each time."""
        return self.owner.get_parameter(self.attribute)


def declared_parameters(root: nn.Module) -> dict[str, Declared]:
    """Every declared parameter below `root` by its full name, in declaration order.

    Raises:
        ValueError: a parameter was registered without being declared.
    """
    found = {}
    for prefix, module in root.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        specs = module.specs if isinstance(module, ParallelModule) else {}
        for name in names:
            if name not in specs:
                raise ValueError(f"parameter {prefix}.{name} was registered without `declare`")
            full = f"{prefix}.{name}" if prefix else name
            found[full] = Declared(module, name, specs[name].named(full))
    return found


def materialize(
    declared: Declared, *, seed: int, tp: int, tp_rank: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Parameter:
    """Replace a meta parameter by one with memory and its initial values, and return it."""
    shard = initial_shard(declared.spec, seed=seed, tp=tp, tp_rank=tp_rank).to(device=device, dtype=dtype)
    parameter = nn.Parameter(shard, requires_grad=declared.spec.trains)
    declared.owner.register_parameter(declared.attribute, parameter)
    return parameter


def materialize_all(root: nn.Module, *, seed: int, tp: int, tp_rank: int, device: torch.device) -> None:
    """Materialize every declared parameter below `root` in fp32."""
    for declared in declared_parameters(root).values():
        materialize(declared, seed=seed, tp=tp, tp_rank=tp_rank, device=device)
