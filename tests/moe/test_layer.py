"""A mixture of experts against the sum that its paper writes, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.sections.model import ModelConfig
from megatron3d.moe.layer import MixtureOfExperts
from megatron3d.nn.inputs import LayerInputs
from megatron3d.params.grads import GradSink
from megatron3d.params.module import declared_parameters, materialize_all
from megatron3d.tensor.context import LayerContext, unsharded_context
from tests.dist.pool import Pool
from tests.largest_result import LargestResult
from tests.nn.dense import model_config

S, B, H, F, E, K = 6, 2, 16, 12, 8, 3
GATED = {"activation": "swiglu", "add_bias_linear": False}


@contextmanager
def wide() -> Iterator[None]:
    """In float64 differences of the order of additions are far below those of a mistake."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """All of this file."""
    with wide():
        yield


def layer_of(context: LayerContext | None = None, **changes: object) -> tuple[ModelConfig, MixtureOfExperts]:
    """A layer with random weights, in float64."""
    given = {"hidden_size": H, "num_experts": E, "moe_router_topk": K, "moe_ffn_hidden_size": F}
    config = model_config(**{**given, "moe_router_dtype": "fp64", **changes})
    layer = MixtureOfExperts(config, context or unsharded_context(), layer=0)
    materialize_all(layer, seed=1, tp=1, tp_rank=0, device=torch.device("cpu"))
    for name, declared in declared_parameters(layer).items():
        spec, generator = declared.spec, torch.Generator().manual_seed(sum(map(ord, name)))
        rank = 0 if context is None or spec.kind == "dense" else context.expert_tp.rank
        values = spec.take(torch.randn(spec.shape, generator=generator) * 0.5, declared.owner.tp, rank)
        declared.owner.register_parameter(declared.attribute, nn.Parameter(values))
    for name, buffer in list(layer.router.named_buffers()):
        layer.router.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype), persistent=False)
    return config, layer


def hidden() -> Tensor:
    return torch.randn(S, B, H, generator=torch.Generator().manual_seed(3))


def run(layer: MixtureOfExperts) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of a sum of weighted outputs, of the input too."""
    x_SBH = hidden().requires_grad_()
    y_SBH = layer(x_SBH, LayerInputs())
    (y_SBH * weights_of_outputs()).sum().backward()
    assert x_SBH.grad is not None, "the input gets a gradient"
    return y_SBH.detach(), {"x": x_SBH.grad, **{n: p.grad for n, p in layer.named_parameters()}}


def weights_of_outputs() -> Tensor:
    return torch.randn(S, B, H, generator=torch.Generator().manual_seed(4))


def as_written(config: ModelConfig, layer: MixtureOfExperts, x_SBH: Tensor, router: Tensor) -> Tensor:
    """Token by token and expert by expert."""
    rows = []
    for x in x_SBH.flatten(0, 1):
        logits = router @ x
        sigmoid = config.moe_router_score_function == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(0)
        ranked = scores + layer.router.bias if config.moe_router_enable_expert_bias else scores
        if config.moe_router_num_groups:
            each = E // config.moe_router_num_groups
            size = config.moe_router_topk // config.moe_router_group_topk
            groups = [ranked[i : i + each].sort(descending=True).values[:size].sum() for i in range(0, E, each)]
            best = sorted(range(len(groups)), key=lambda i: -groups[i])[: config.moe_router_group_topk]
            inside = [i for g in best for i in range(g * each, (g + 1) * each)]
        else:
            inside = list(range(E))
        chosen = sorted(inside, key=lambda i: -ranked[i])[:K]
        if sigmoid:
            weights = scores[chosen] / scores[chosen].sum()
        else:
            weights = scores[chosen] if config.moe_router_pre_softmax else logits[chosen].softmax(0)
        y = torch.zeros(H)
        for weight, i in zip(weights, chosen, strict=True):
            y = y + weight * (config.moe_router_topk_scaling_factor or 1.0) * expert(config, layer, i, x)
        rows.append(y)
    y_SBH = torch.stack(rows).view(x_SBH.shape)
    if layer.mixing is not None:
        share = (x_SBH @ layer.mixing.weight.t() + layer.mixing.bias).softmax(-1)
        residual = torch.stack([expert_of(config, layer.shared, x) for x in x_SBH.flatten(0, 1)]).view(x_SBH.shape)
        return share[..., 0:1] * y_SBH + share[..., 1:2] * residual
    if layer.shared is not None:
        gate = 1.0 if layer.shared_gate is None else (x_SBH @ layer.shared_gate.weight.t()).sigmoid()
        inner = x_SBH @ layer.shared.up.weight.t() + layer.shared.up.bias
        act = nn.functional.gelu(inner, approximate="tanh")
        y_SBH = y_SBH + gate * (act @ layer.shared.down.weight.t() + layer.shared.down.bias)
    return y_SBH


def expert(config: ModelConfig, layer: MixtureOfExperts, number: int, x: Tensor) -> Tensor:
    return expert_of(config, layer.experts[str(number)], x)


def expert_of(config: ModelConfig, one: nn.Module, x: Tensor) -> Tensor:
    inner = one.up.weight @ x
    if config.is_gated:
        return one.down.weight @ (nn.functional.silu(inner[:F]) * inner[F:])
    return one.down.weight @ nn.functional.gelu(inner + one.up.bias, approximate="tanh") + one.down.bias


SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5}
ROUTERS = {
    "after": {},
    "before": {"moe_router_pre_softmax": True, **GATED},
    "sigmoid": {**SIGMOID, **GATED},
    "bias": {**SIGMOID, "moe_router_enable_expert_bias": True},
    "groups": {**SIGMOID, "moe_router_num_groups": 4, "moe_router_group_topk": 3, **GATED},
    "groups before": {"moe_router_pre_softmax": True, "moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "shared": {"moe_shared_expert_intermediate_size": 20},
    "residual": {"mlp_type": "residual"},
    "residual gated": {"mlp_type": "residual", **GATED},
    "shared gate": {"moe_shared_expert_intermediate_size": 20, "moe_shared_expert_gate": True},
}


@pytest.mark.parametrize("changes", ROUTERS.values(), ids=ROUTERS)
def test_outputs_and_gradients_are_those_of_the_sum_as_written(changes: dict[str, object]) -> None:
    config, layer = layer_of(**changes)
    if config.moe_router_enable_expert_bias:
        layer.router.bias.copy_(torch.linspace(-0.4, 0.4, E))
    y_SBH, gradients = run(layer)
    layer.zero_grad()
    x_SBH = hidden().requires_grad_()
    expected_SBH = as_written(config, layer, x_SBH, layer.router.weight)
    torch.testing.assert_close(y_SBH, expected_SBH, rtol=0, atol=1e-12)
    (expected_SBH * weights_of_outputs()).sum().backward()
    expected = {"x": x_SBH.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    for name, gradient in gradients.items():
        want = torch.zeros_like(gradient) if expected[name] is None else expected[name]
        torch.testing.assert_close(gradient, want, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_an_expert_without_tokens_has_gradients_of_zero_and_all_tokens_may_choose_one() -> None:
    _, layer = layer_of(moe_router_topk=1, moe_router_pre_softmax=True, **GATED)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[5] = 0.1
    x_SBH = hidden().abs()  # positive, so that all choose expert 5
    y_SBH = layer(x_SBH, LayerInputs())
    y_SBH.sum().backward()
    for i in range(E):
        gradient = layer.experts[str(i)].up.weight.grad
        assert gradient is not None and (gradient.abs().sum() > 0) == (i == 5)


def test_bias_follows_the_load_in_whole_numbers() -> None:
    _, layer = layer_of(**SIGMOID, moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.25)
    layer.router.tokens_per_expert.copy_(torch.tensor([9.0, 3, 3, 3, 3, 3, 3, 0]))  # the mean is 27 / 8
    layer.router.update_state()
    moved = torch.tensor([-1.0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.float32) * 0.25
    torch.testing.assert_close(layer.router.bias, moved - moved.mean())


# --- Transports ------------------------------------------------------------------------------------------------------

PADDED: dict[str, object] = {"moe_pad_expert_input_to_capacity": True}
GATHERED: dict[str, object] = {"moe_token_dispatcher_type": "allgather"}
_READS = ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero")


@contextmanager
def counting_reads() -> Iterator[list[str]]:
    """Note each read of a value from the device."""
    reads: list[str] = []

    def noting(name: str) -> Callable[..., object]:
        read = getattr(Tensor, name)
        return lambda *args, **options: reads.append(name) or read(*args, **options)

    with ExitStack() as patched:
        for name in _READS:
            patched.enter_context(mock.patch.object(Tensor, name, noting(name)))
        yield reads


@pytest.mark.parametrize("factor", [0.5, 1.0, 9.0])
@pytest.mark.parametrize(("changes", "reads"), [(PADDED, 0), (GATHERED, 1), (GATHERED | PADDED, 0)], ids=str)
def test_every_transport_gives_the_same_and_padding_reads_no_count(
    changes: dict[str, object], reads: int, factor: float
) -> None:
    given = {"moe_expert_capacity_factor": factor, "moe_router_topk": 3}
    with counting_reads() as uneven:
        y_SBH, gradients = run(layer_of(**given)[1])
    with counting_reads() as found:
        other_SBH, others = run(layer_of(**given, **changes)[1])
    assert len(uneven) == 1 and len(found) == reads, (uneven, found)
    torch.testing.assert_close(other_SBH, y_SBH, rtol=0, atol=1e-13)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize(
    "changes", [{}, {"moe_expert_capacity_factor": 256.0}, GATHERED], ids=["dropless", "capacity", "gathered"]
)
def test_a_thousand_experts_take_memory_of_tokens_by_experts_and_no_more(changes: dict[str, object]) -> None:
    """With T tokens, E experts and a capacity C nothing has the size [T, E, C]: the largest are the scores [T, E] and
    the router's weight [E, H]."""
    experts, chosen = 1024, 2
    _, layer = layer_of(num_experts=experts, moe_router_topk=chosen, moe_ffn_hidden_size=2, **changes)
    x_SBH = hidden().requires_grad_()
    with LargestResult() as largest:
        layer(x_SBH, LayerInputs()).sum().backward()
    assert largest.elements <= experts * max(S * B, H), largest.elements


# --- Ranks with parts of a sequence -----------------------------------------------------------------------------------

# Half of the experts on each rank, and half of each expert; lengths that two ranks do not divide, of which one gives
# the second rank nothing.
SHARDED = [
    (Layout(tp=2, ep=2, etp=1), 5, {}),
    (Layout(tp=2), 1, {}),
    (Layout(tp=2, ep=2, etp=1), 5, PADDED),
    (Layout(tp=2), 5, PADDED),
    (Layout(tp=2, ep=2, etp=1), 5, GATHERED),
    (Layout(tp=2), 5, GATHERED | PADDED),
]


def passed(
    rank: int, world_size: int, layout: Layout, length: int, changes: dict[str, object]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradient of the input, the same on all ranks, and this rank's gradient of the router."""
    mesh = make_mesh(layout)
    context = LayerContext(mesh.tp, False, GradSink(), expert=mesh.expert, expert_tp=mesh.expert_tp)
    with wide():
        given = {"moe_router_load_balancing_type": ("none",), "moe_expert_capacity_factor": 1.0}
        _, layer = layer_of(context, **given, **GATED, **changes)
        x_SBH = hidden()[:length].requires_grad_()
        y_SBH = layer(x_SBH, LayerInputs())
        (y_SBH * weights_of_outputs()[:length]).sum().backward()
    return y_SBH.detach(), x_SBH.grad, layer.router.weight.grad


@pytest.mark.parametrize(("layout", "length", "changes"), SHARDED, ids=str)
def test_a_sequence_that_ranks_cannot_divide_passes_like_any_other(
    pool: Pool, layout: Layout, length: int, changes: dict[str, object]
) -> None:
    y_SBH, grad_SBH, grad_EH = passed(0, 1, Layout(), length, {})
    by_rank = pool.run(2, passed, layout, length, changes)
    for found in by_rank:
        torch.testing.assert_close(found[0], y_SBH, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], grad_SBH, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(found[2] for found in by_rank), grad_EH, rtol=0, atol=1e-12)
