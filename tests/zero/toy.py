"""A toy model of two units, a tied table at both ends of a pipeline, and a unit of experts where the layout has a grid
of these, with made-up gradients that add up exactly.

Gradients are small multiples of 1/4, few enough that every sum over micro-batches, ranks and holders is a number that
bf16 holds exactly. So whatever differs from one process is a defect and not rounding, in any gradient dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import Axis, Mesh
from megatron3d.params.grads import GradSink
from megatron3d.params.module import Declared, ParallelModule, declared_parameters
from megatron3d.params.spec import Init, ParamSpec
from megatron3d.params.streams import stream_seed
from megatron3d.zero.engine import UnitParameters, ZeroEngine
from megatron3d.zero.policy import policy_of
from megatron3d.zero.unit import UnitOptions

SEED = 1234
NUM_MICROBATCHES = 2
TABLE, EXPERTS, NUM_EXPERTS = "table", "experts", 4


@dataclass(frozen=True)
class Setting:
    """A layout and the options that the result must not depend on (but for rounding of bf16 weights)."""

    layout: Layout
    zero_stage: int = 0
    param_dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype = torch.float32
    overlap: bool = True

    def __str__(self) -> str:
        dtypes = f"{self.param_dtype}-{self.grad_dtype}".replace("torch.", "")
        shard = f"of{self.layout.shard_size}" if self.layout.zero_shard else ""
        overlap = "overlap" if self.overlap else "plain"
        return f"{self.layout}-zero{self.zero_stage}{shard}-{dtypes}-{overlap}".replace(" ", "")


class FirstUnit(ParallelModule):
    """Sharded and replicated, decaying and not, with sums over the tensor axis that are partial."""

    def __init__(self, tp: int) -> None:
        super().__init__(tp=tp)
        normal = Init("normal", 0.5)
        self.declare("qkv", (16, 6), init=normal, decays=True, tp_dim=0, parts=(8, 4, 4))
        self.declare("qkv_bias", (16,), init=Init("zeros"), decays=False, tp_dim=0, parts=(8, 4, 4))
        self.declare("positions", (5, 6), init=normal, decays=True, tp_gradient="partial")
        self.declare("norm", (6,), init=Init("ones"), decays=False, tp_gradient="equal")


class SecondUnit(ParallelModule):
    """A matrix cut along its columns and a norm whose gradients are partial sums."""

    def __init__(self, tp: int) -> None:
        super().__init__(tp=tp)
        self.declare("down", (7, 8), init=Init("normal", 0.5), decays=True, tp_dim=1)
        self.declare("norm", (7,), init=Init("ones"), decays=False, tp_gradient="partial")


class TiedTable(ParallelModule):
    """A padded table that both ends of the pipeline hold."""

    def __init__(self, tp: int, *, tied_copy: bool) -> None:
        super().__init__(tp=tp)
        normal = Init("normal", 0.5)
        self.declare(
            "weight", (10, 3), init=normal, decays=True, tp_dim=0, padded_size=16, tied_copy=tied_copy, is_table=True
        )


class ExpertUnit(ParallelModule):
    """Some experts, each a sharded matrix and a replicated vector whose gradients are partial sums."""

    def __init__(self, numbers: range, tp: int) -> None:
        super().__init__(tp=tp)
        for number in numbers:
            normal = Init("normal", 0.5)
            self.declare(f"up{number}", (8, 5), init=normal, decays=True, tp_dim=0, kind="expert")
            self.declare(f"norm{number}", (5,), init=Init("ones"), decays=False, tp_gradient="partial", kind="expert")


def has_experts(layout: Layout) -> bool:
    """Whether the toy has experts at this layout."""
    return layout.ep > 1 or layout.etp is not None


def model_of(mesh: Mesh) -> nn.ModuleDict:
    """This rank's units: the first on the first stage, the second on the last, the table on both; its own experts."""
    tp, stage, last = mesh.tp.size, mesh.pp.rank, mesh.pp.size - 1
    units: dict[str, nn.Module] = {}
    if stage in (0, last):
        units[TABLE] = TiedTable(tp, tied_copy=stage != 0)
    if stage == 0:
        units["first"] = FirstUnit(tp)
    if stage == last:
        units["second"] = SecondUnit(tp)
    if stage == last and has_experts(mesh.layout):
        each = NUM_EXPERTS // mesh.expert.size
        first = each * mesh.expert.rank
        units[EXPERTS] = ExpertUnit(range(first, first + each), mesh.expert_tp.size)
    return nn.ModuleDict(units)


def whole_specs(*, with_experts: bool = False) -> dict[str, ParamSpec]:
    """Every parameter of the model, once."""
    units = nn.ModuleDict({TABLE: TiedTable(1, tied_copy=False), "first": FirstUnit(1), "second": SecondUnit(1)})
    if with_experts:
        units[EXPERTS] = ExpertUnit(range(NUM_EXPERTS), 1)
    return {name: one.spec for name, one in declared_parameters(units).items()}


def engine_of(setting: Setting, mesh: Mesh, sink: GradSink) -> tuple[ZeroEngine, dict[str, Declared]]:
    """The engine over this rank's units, and its declared parameters."""
    model = model_of(mesh)
    declared = declared_parameters(model)
    units = {}
    for name in model:
        members = tuple(one for full, one in declared.items() if full.startswith(name + "."))
        units[name] = UnitParameters((mesh.pp.rank,), members, len(members), is_tied=name == TABLE)
    options = UnitOptions(
        policy=policy_of(setting.zero_stage),
        param_dtype=setting.param_dtype,
        grad_dtype=setting.grad_dtype,
        device=torch.device("cpu"),
        seed=SEED,
        overlap=setting.overlap,
        overlap_gather=setting.overlap,
    )
    return ZeroEngine(units, mesh, options, sink), declared


def _quarters(shape: tuple[int, ...], *names: str | int) -> Tensor:
    generator = torch.Generator().manual_seed(stream_seed(SEED, *names))
    return torch.randint(-2, 3, shape, generator=generator) / 4.0


def contribution(spec: ParamSpec, step: int, sample: int, *, holder: int, tp: int, tp_rank: int) -> Tensor:
    """What one holder's backward of one micro-batch brings on one tensor rank.

    A partial gradient is cut into random summands, the last of which makes the sum right.
    """
    whole = _quarters(spec.shape, "grad", spec.name, step, sample, holder)
    if spec.tp_gradient != "partial":
        return spec.take(whole, tp, tp_rank).clone()
    summands = [_quarters(spec.shape, "summand", spec.name, step, sample, rank) for rank in range(tp - 1)]
    return summands[tp_rank] if tp_rank < tp - 1 else whole - torch.stack([whole * 0, *summands]).sum(0)


def whole_gradient(spec: ParamSpec, step: int, *, num_samples: int, num_holders: int) -> Tensor:
    """The sum of all contributions to one parameter."""
    holders = range(num_holders if spec.name.startswith(TABLE) else 1)
    return torch.stack(
        [_quarters(spec.shape, "grad", spec.name, step, sample, h) for sample in range(num_samples) for h in holders]
    ).sum(0)


def tensor_axis(spec: ParamSpec, mesh: Mesh) -> Axis:
    """The ranks that shard a parameter."""
    return mesh.expert_tp if spec.kind == "expert" else mesh.tp


def grad_axis(spec: ParamSpec, mesh: Mesh) -> Axis:
    """The ranks that sum its gradient: each brings micro-batches of its own."""
    return mesh.expert_grad if spec.kind == "expert" else mesh.grad


def num_samples(spec: ParamSpec, mesh: Mesh) -> int:
    """Micro-batches whose gradients a parameter sums up in a step."""
    return grad_axis(spec, mesh).size * NUM_MICROBATCHES
