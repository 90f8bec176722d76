"""ParallelModule: a module whose parameters and state are declared, not allocated.

`declare` records a `ParamSpec` and registers a parameter on the meta device in its local shape. Nothing has memory
until `materialize` (or the flat buffers of the ZeRO room) gives it some, so a model of a trillion parameters can be
described, counted and cut on a laptop. `declare_state` does the same for tensors that are no parameters (`state.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron3d.params.init import initial_shard
from megatron3d.params.spec import ZEROS, Init, ParamKind, ParamSpec, TpGradient
from megatron3d.params.state import TOTAL_DTYPE, Reduction, StateSpec, TotalSpec, combine, on_gradient


class ParallelModule(nn.Module):
    """A module that owns declared parameters; `tp` is the number of ranks that share its sharded ones."""

    def __init__(self, *, tp: int = 1) -> None:
        super().__init__()
        self.tp = tp
        self.specs: dict[str, ParamSpec] = {}
        self.state_specs: dict[str, StateSpec] = {}
        self.total_specs: dict[str, TotalSpec] = {}
        self.has_counted = False  # whether anything was counted under a declared total since the last step

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

    def declare_state(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        init: Init = ZEROS,
        tp_dim: int | None = None,
        beside: str = "",
        may_be_missing: bool = False,
    ) -> None:
        """Declare state that is saved and resharded but gets no gradient; see `params/state.py` for its two kinds.

        Args:
            name: local to this module; of state beside a parameter the name of its kind, such as "average".
            shape: full shape; that of the parameter where it is beside one.
            dtype: of the values, in memory and in checkpoints.
            init: first values; state beside a parameter starts as zeros.
            tp_dim: the dimension that the tensor-parallel ranks shard; None where all hold the same.
            beside: local name of the parameter that it has an element for each element of; empty for state of the
                module itself, which becomes its buffer `name`.
            may_be_missing: whether a checkpoint may lack it; state of the module only.
        """
        if beside:
            cut = self.specs[beside]
            if cut.shape != shape:
                raise ValueError(f"state {name} has shape {shape}, and {beside} beside which it is has {cut.shape}")
            self.state_specs[f"{name}/{beside}"] = StateSpec(cut, dtype, beside=beside, kind=name)
            return
        cut = ParamSpec(name, shape, init, decays=False, tp_dim=tp_dim, trains=False)
        self.state_specs[name] = StateSpec(cut, dtype, may_be_missing=may_be_missing)
        empty = torch.empty(cut.local_shape(self.tp), dtype=dtype, device="meta")
        self.register_buffer(name, empty, persistent=False)

    def declare_total(
        self, name: str, shape: tuple[int, ...], *, reduction: Reduction = "sum", is_partial: bool = False
    ) -> None:
        """Declare what `contribute` counts in a step, for `update_state`: an fp64 buffer `name` of local `shape`.

        `reduction` is over micro-batches and the ranks that read other samples, and with `is_partial` over the
        tensor-parallel ranks too.
        """
        self.total_specs[name] = TotalSpec(reduction, is_partial)
        self.register_buffer(name, torch.empty(shape, dtype=TOTAL_DTYPE, device="meta"), persistent=False)

    def contribute(self, x: Tensor, name: str, values: Tensor) -> Tensor:
        """`x` as it is; when its gradient comes, `values` are counted under the declared total `name`.

        So each micro-batch of a training step counts once, however often its forward is run, and evaluations never.
        """
        total, values, reduction = self.get_buffer(name), values.detach(), self.total_specs[name].reduction

        def count() -> None:
            combine(total, values, reduction)
            self.has_counted = True

        return on_gradient(x, count)

    def clear_totals(self) -> None:
        """Forget what was counted, for a step that begins."""
        for name in self.total_specs:
            self.get_buffer(name).zero_()
        self.has_counted = False

    def update_state(self) -> None:
        """Change declared state in place after a step, by its totals; the same on all ranks that hold it.

        Called without gradients, once a step that updates the weights, when totals are those of the global batch; not
        where there are totals and nothing was counted, as in front of everything that trains.
        """


@dataclass(frozen=True)
class DeclaredState:
    """Declared state in its module, under the full name that checkpoints have: `layers.3.router.bias` of a module,
    `average/layers.3.mlp.up.weight` beside a parameter."""

    owner: ParallelModule
    attribute: str
    name: str
    spec: StateSpec


def stateful_modules(roots: Iterable[nn.Module]) -> dict[str, ParallelModule]:
    """The modules below `roots` that declare state of their own or totals, each once, by full name."""
    found: dict[ParallelModule, str] = {}
    for prefix, module in (named for root in roots for named in root.named_modules()):
        if isinstance(module, ParallelModule) and (module.state_specs or module.total_specs):
            found.setdefault(module, prefix)
    return {prefix: module for module, prefix in found.items()}


def declared_states(roots: Iterable[nn.Module]) -> dict[str, DeclaredState]:
    """All state of modules (not what is beside parameters) below `roots` by its full name."""
    return {
        full: DeclaredState(module, name, full, spec)
        for prefix, module in stateful_modules(roots).items()
        for name, spec in module.state_specs.items()
        if not spec.beside
        for full in [f"{prefix}.{name}" if prefix else name]
    }


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

    @property
    def beside(self) -> dict[str, torch.dtype]:
        """The kinds of state beside the parameter, with their dtypes."""
        specs = self.owner.state_specs.values()
        return {spec.kind: spec.dtype for spec in specs if spec.beside == self.attribute}


def declared_parameters(root: nn.Module) -> dict[str, Declared]:
    """Every declared parameter below `root` by its full name, in declaration order.

    Raises:
        ValueError: a parameter was registered without being declared.
    """
    found = {}
    for prefix, module in root.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        for name in names:
            if not isinstance(module, ParallelModule) or name not in module.specs:
                raise ValueError(f"parameter {prefix}.{name} was registered without `declare`")
            full = f"{prefix}.{name}" if prefix else name
            found[full] = Declared(module, name, module.specs[name].named(full))
    return found


def materialize(
    declared: Declared, *, seed: int, tp: int, tp_rank: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Parameter:
    """Replace a meta parameter by one with memory and its initial values, and return it."""
    shard = initial_shard(declared.spec, seed=seed, tp=tp, tp_rank=tp_rank).to(device=device, dtype=dtype)
    parameter = nn.Parameter(shard, requires_grad=declared.spec.trains)
    declared.owner.register_parameter(declared.attribute, parameter)
    return parameter


def materialize_state(declared: DeclaredState, *, seed: int, tp: int, tp_rank: int, device: torch.device) -> Tensor:
    """Replace a meta buffer by one with memory and its first values, and return it."""
    cut, owner = declared.spec.cut.named(declared.name), declared.owner
    value = initial_shard(cut, seed=seed, tp=tp, tp_rank=tp_rank).to(device=device, dtype=declared.spec.dtype)
    owner.register_buffer(declared.attribute, value, persistent=False)
    return value


def materialize_all(root: nn.Module, *, seed: int, tp: int, tp_rank: int, device: torch.device) -> None:
    """Materialize every declared parameter below `root` in fp32."""
    for declared in declared_parameters(root).values():
        materialize(declared, seed=seed, tp=tp, tp_rank=tp_rank, device=device)
