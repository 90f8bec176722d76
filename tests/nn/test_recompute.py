"""Recomputation changes no bit with dropout on, runs again what it should, and its plans cover every layer once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.nn.block import Block
from megatron3d.nn.dropout import DropoutStream
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.recompute import LayerGroup, plan_recompute, run_layers
from megatron3d.params.grads import GradSink
from megatron3d.params.module import declared_parameters
from megatron3d.tensor.context import LayerContext
from tests.dist.pool import Pool
from tests.nn.dense import model_config
from tests.tensor.full import fill, numbered

NUM_LAYERS = 4
CONFIG = model_config(num_layers=NUM_LAYERS, hidden_dropout=0.2, attention_dropout=0.3)
PLANS = {
    "uniform 1": ("full", "uniform", 1),
    "uniform 3": ("full", "uniform", 3),
    "uniform all": ("full", "uniform", 9),
    "default method": ("full", None, None),
    "block 2": ("full", "block", 2),
    "block all": ("full", "block", 9),
    "selective": ("selective", None, None),
}


def run(plan: tuple[str | None, str | None, int | None], *, tp: int = 1, wants_grad: bool = True) -> list[Tensor]:
    """Output, input gradient and every weight gradient; and how often each layer ran, as the last tensor."""
    granularity, method, layers_each = plan
    context = LayerContext(make_mesh(Layout(tp=tp)).tp, tp > 1, GradSink())
    selective = granularity == "selective"
    layers = [Block(CONFIG, context, layer=number, recompute_core=selective) for number in range(NUM_LAYERS)]
    runs = torch.zeros(NUM_LAYERS)
    for number, layer in enumerate(layers):
        fill(layer, context.tp, dtype=torch.float32)
        layer.register_forward_pre_hook(lambda module, args, number=number: runs[number].add_(1) and None)
    groups = plan_recompute(NUM_LAYERS, granularity=granularity, method=method, layers_each=layers_each)
    x = numbered(8 // tp, 2, 16, seed=1, dtype=torch.float32).requires_grad_()
    with torch.set_grad_enabled(wants_grad):
        y = run_layers(layers, groups, x, LayerInputs(dropout=DropoutStream(11, 0)))
    if not wants_grad:
        return [y, runs]
    y.square().sum().backward()
    grads = [one.parameter.grad for layer in layers for one in declared_parameters(layer).values()]
    return [y.detach(), x.grad, *grads, runs]


@pytest.mark.parametrize("name", PLANS)
def test_outputs_and_gradients_are_bitwise_those_without_recomputation(name: str) -> None:
    plain, recomputed = run((None, None, None))[:-1], run(PLANS[name])[:-1]
    assert len(plain) == len(recomputed) > NUM_LAYERS
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))


def _on_two_ranks(rank: int, world_size: int) -> None:
    plain = run((None, None, None), tp=world_size)[:-1]
    for name, plan in PLANS.items():
        same = [torch.equal(a, b) for a, b in zip(plain, run(plan, tp=world_size)[:-1], strict=True)]
        assert all(same), f"{name} on {world_size} ranks"


def test_under_sequence_parallelism_recomputation_changes_no_bit(pool: Pool) -> None:
    pool.run(2, _on_two_ranks)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform 1", [2, 2, 2, 2]),
        ("uniform 3", [2, 2, 2, 2]),
        ("block 2", [2, 2, 1, 1]),
        ("block all", [2, 2, 2, 2]),
        ("selective", [1, 1, 1, 1]),
    ],
)
def test_layers_run_again_where_the_plan_says_so(name: str, expected: list[int]) -> None:
    assert run(PLANS[name])[-1].tolist() == expected


def test_nothing_runs_again_where_no_gradient_is_wanted() -> None:
    assert run(PLANS["uniform 1"], wants_grad=False)[-1].tolist() == [1, 1, 1, 1]


@given(st.integers(1, 12), st.sampled_from(["full", "selective", None]), st.sampled_from(["uniform", "block", None]),
       st.one_of(st.none(), st.integers(1, 14)))  # fmt: skip
def test_a_plan_holds_every_layer_once_and_in_order(
    num_layers: int, granularity: str | None, method: str | None, layers_each: int | None
) -> None:
    groups = plan_recompute(num_layers, granularity=granularity, method=method, layers_each=layers_each)
    assert [layer for group in groups for layer in group.layers] == list(range(num_layers))
    recomputed = [layer for group in groups if group.recompute for layer in group.layers]
    if granularity != "full":
        assert recomputed == []
    elif method == "block":
        assert recomputed == list(range(min(num_layers, layers_each or 1)))
    else:
        assert recomputed == list(range(num_layers))


def test_uniform_groups_keep_only_the_input_of_each_group() -> None:
    groups = plan_recompute(5, granularity="full", method="uniform", layers_each=2)
    assert groups == (
        LayerGroup(range(0, 2), True),
        LayerGroup(range(2, 4), True),
        LayerGroup(range(4, 5), True),
    )
