"""Column- and row-parallel linear layers against dense torch: outputs, gradients, communication, deferred work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.params.grads import GradSink
from megatron3d.params.module import declared_parameters
from megatron3d.params.spec import Init
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import ColumnParallelLinear, RowParallelLinear
from tests.dist.pool import Pool
from tests.tensor.full import assert_gradients_equal, fill, numbered

S, B, INPUT = 8, 3, 12
PARTS = (16, 4, 4)  # query, key and value of a grouped attention: unequal parts
OUTPUT = sum(PARTS)
NORMAL = Init("normal", 0.02)
LAYOUTS = [(1, False), (1, True), (2, False), (2, True), (4, False), (4, True)]


def context_of(tp: int, sequence_parallel: bool) -> LayerContext:
    return LayerContext(make_mesh(Layout(tp=tp)).tp, sequence_parallel, GradSink())


def leaves_of(wholes: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole.clone().requires_grad_() for name, whole in wholes.items()}


def residual_part(x: Tensor, context: LayerContext) -> Tensor:
    """This rank's part of a tensor on the residual stream, by plain slicing."""
    if not context.sequence_parallel:
        return x
    share = x.shape[0] // context.tp.size
    return x[share * context.tp.rank : share * (context.tp.rank + 1)]


def check_column(context: LayerContext, *, bias: bool, parts: tuple[int, ...]) -> None:
    layer = ColumnParallelLinear(context, INPUT, OUTPUT, bias=bias, init=NORMAL, parts=parts)
    leaves = leaves_of(fill(layer, context.tp))
    x, weight_of_loss = numbered(S, B, INPUT, seed=1).requires_grad_(), numbered(S, B, OUTPUT, seed=2)
    y = F.linear(x, leaves["weight"], leaves.get("bias"))
    (weight_of_loss * y**2).sum().backward()

    def columns(whole: Tensor) -> Tensor:
        cuts, first = [], 0
        for part in parts or (OUTPUT,):
            share = part // context.tp.size
            cuts.append(whole[..., first + share * context.tp.rank : first + share * (context.tp.rank + 1)])
            first += part
        return torch.cat(cuts, -1)

    own_x = residual_part(x.detach(), context).clone().requires_grad_()
    own_y = layer(own_x)
    torch.testing.assert_close(own_y, columns(y.detach()))
    (columns(weight_of_loss) * own_y**2).sum().backward()
    torch.testing.assert_close(own_x.grad, residual_part(x.grad, context))
    assert_gradients_equal(layer, context.tp, leaves)


def check_row(context: LayerContext, *, bias: bool) -> None:
    layer = RowParallelLinear(context, INPUT, OUTPUT, bias=bias, init=NORMAL)
    leaves = leaves_of(fill(layer, context.tp))
    x, weight_of_loss = numbered(S, B, INPUT, seed=1).requires_grad_(), numbered(S, B, OUTPUT, seed=2)
    y = F.linear(x, leaves["weight"], leaves.get("bias"))
    (weight_of_loss * y**2).sum().backward()

    def features(whole: Tensor) -> Tensor:
        share = INPUT // context.tp.size
        return whole[..., share * context.tp.rank : share * (context.tp.rank + 1)]

    own_x = features(x.detach()).clone().requires_grad_()
    own_y = layer(own_x)
    torch.testing.assert_close(own_y, residual_part(y.detach(), context))
    (residual_part(weight_of_loss, context) * own_y**2).sum().backward()
    torch.testing.assert_close(own_x.grad, features(x.grad))
    assert_gradients_equal(layer, context.tp, leaves)


def _check_linears(rank: int, world_size: int, sequence_parallel: bool) -> None:
    context = context_of(world_size, sequence_parallel)
    for bias in (True, False):
        check_column(context, bias=bias, parts=PARTS)
        check_column(context, bias=bias, parts=())
        check_row(context, bias=bias)


def on_ranks(pool: Pool, tp: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Run a body on the ranks of a tensor axis; on one rank right here, without torch.distributed."""
    return [body(0, 1, *args)] if tp == 1 else pool.run(tp, body, *args)


@pytest.mark.parametrize(("tp", "sequence_parallel"), LAYOUTS)
def test_linear_outputs_and_all_gradients_equal_dense(pool: Pool, tp: int, sequence_parallel: bool) -> None:
    on_ranks(pool, tp, _check_linears, sequence_parallel)


def _pair_counts(rank: int, world_size: int, sequence_parallel: bool) -> list[dict[tuple[str, str], tuple[int, int]]]:
    context = context_of(world_size, sequence_parallel)
    up = ColumnParallelLinear(context, INPUT, OUTPUT, bias=True, init=NORMAL)
    down = RowParallelLinear(context, OUTPUT, INPUT, bias=True, init=NORMAL)
    fill(up, context.tp)
    fill(down, context.tp)
    x = residual_part(numbered(S, B, INPUT, seed=1), context).clone().requires_grad_()
    y = down(up(x))
    forward = context.tp.meter.read()
    context.tp.meter.reset()
    y.backward(torch.ones_like(y))
    return [forward, context.tp.meter.read()]


def test_a_pair_of_layers_costs_one_all_reduce_each_way(pool: Pool) -> None:
    """Source: Shoeybi et al. 2019, section 3: f and g, one all-reduce of [S, B, H] forward and one backward."""
    size = S * B * INPUT * 8
    once = {("tp", "all_reduce"): (1, size)}
    assert pool.run(2, _pair_counts, False) == [[once, once]] * 2


def test_a_pair_of_layers_costs_gathers_and_scatters_under_sequence_parallelism(pool: Pool) -> None:
    """Source: Korthikanti et al. 2022, section 4.2.2: one pair each way, and the kept shard gathered once more."""
    size = S * B * INPUT * 8
    forward = {("tp", "all_gather"): (1, size), ("tp", "reduce_scatter"): (1, size)}
    backward = {("tp", "all_gather"): (2, size * 2), ("tp", "reduce_scatter"): (1, size)}
    assert pool.run(2, _pair_counts, True) == [[forward, backward]] * 2


def _deferred(rank: int, world_size: int, sequence_parallel: bool) -> None:
    context = context_of(world_size, sequence_parallel)
    up = ColumnParallelLinear(context, INPUT, OUTPUT, bias=True, init=NORMAL, parts=PARTS)
    down = RowParallelLinear(context, OUTPUT, INPUT, bias=False, init=NORMAL)
    weights = {}
    for layer in (up, down):
        fill(layer, context.tp, dtype=torch.float32)
        weights.update({(layer, name): one.parameter for name, one in declared_parameters(layer).items()})
    x = residual_part(numbered(S, B, INPUT, seed=1, dtype=torch.float32), context)

    def backward() -> Tensor:
        for weight in weights.values():
            weight.grad = None
        own_x = x.clone().requires_grad_()
        y = down(up(own_x).tanh())
        (y + own_x).square().sum().backward()
        return own_x.grad

    grad_x = backward()
    at_once = {name: weight.grad for name, weight in weights.items()}
    with context.sink.defer() as work:
        assert torch.equal(backward(), grad_x), "the input gradient depends on when weight gradients are computed"
        assert all(weight.grad is None for weight in weights.values()), "work was done instead of deferred"
    assert len(work) == 2
    for item in work:
        item()
    for name, weight in weights.items():
        assert torch.equal(weight.grad, at_once[name])


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_deferred_weight_gradients_equal_immediate_ones_bitwise(pool: Pool, tp: int, sequence_parallel: bool) -> None:
    on_ranks(pool, tp, _deferred, sequence_parallel)


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16])
def test_bf16_layers_accumulate_into_bound_buffers(buffer_dtype: torch.dtype) -> None:
    context = context_of(1, False)
    layer = ColumnParallelLinear(context, INPUT, OUTPUT, bias=True, init=NORMAL)
    wholes = fill(layer, context.tp, dtype=torch.bfloat16)
    buffers = {name: torch.zeros(whole.shape, dtype=buffer_dtype) for name, whole in wholes.items()}
    arrivals: list[str] = []
    for name, one in declared_parameters(layer).items():
        context.sink.bind(one.parameter, buffers[name], lambda name=name: arrivals.append(name))
    expected = {name: torch.zeros(whole.shape) for name, whole in wholes.items()}
    for mb in range(3):
        x = (numbered(S, B, INPUT, seed=mb) / 2).bfloat16().requires_grad_()
        grad = (numbered(S, B, OUTPUT, seed=50 + mb) / 2).bfloat16()
        layer(x).backward(grad)
        expected["weight"] += grad.reshape(-1, OUTPUT).float().t() @ x.detach().reshape(-1, INPUT).float()
        expected["bias"] += grad.float().sum((0, 1))
    assert sorted(arrivals) == ["bias"] * 3 + ["weight"] * 3
    assert layer.weight.grad is None and layer.bias.grad is None
    # Each contribution is rounded to bf16 once, and in a bf16 buffer each sum once more: half of 2^-8 of at most 16.
    num_roundings = 3 if buffer_dtype == torch.float32 else 6
    for name, buffer in buffers.items():
        assert expected[name].abs().max() < 16
        torch.testing.assert_close(buffer.float(), expected[name], rtol=0, atol=num_roundings * 2**-9 * 16)
