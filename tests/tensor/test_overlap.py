"""Products and collectives in chunks: results against dense torch in fp64, what is sent, and in which order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron3d.comm import collectives
from megatron3d.comm.mesh import Axis
from megatron3d.comm.meter import Meter
from megatron3d.comm.shape_only import ShapeOnlyGroup
from megatron3d.params.grads import GradSink
from megatron3d.params.module import declared_parameters
from megatron3d.tensor import overlap
from megatron3d.tensor.context import LayerContext
from megatron3d.tensor.linear import ColumnParallelLinear, RowParallelLinear
from tests.dist.pool import Pool
from tests.tensor.full import fill, numbered
from tests.tensor.test_linear import (
    INPUT,
    NORMAL,
    OUTPUT,
    PARTS,
    B,
    S,
    check_column,
    check_row,
    context_of,
    residual_part,
)

LAYOUTS = [(2, False), (2, True), (4, True)]
CHUNKS = (2, 3, 50)  # of 8, 4 or 2 positions: equal ones, unequal ones, and as many as there are positions


@contextmanager
def _deferred(context: LayerContext) -> Iterator[None]:
    """Every backward within it is an input-gradient step, whose deferred work is done when it is over."""
    real = Tensor.backward

    def backward(loss: Tensor) -> None:
        with context.sink.defer() as works:
            real(loss)
        for work in works:
            work()

    with mock.patch.object(Tensor, "backward", backward):
        yield


def _check(rank: int, world_size: int, sequence_parallel: bool) -> None:
    for chunks in CHUNKS:
        context = replace(context_of(world_size, sequence_parallel), overlap_chunks=chunks)
        for bias in (True, False):
            check_column(context, bias=bias, parts=PARTS)
            check_row(context, bias=bias)
        with _deferred(context):
            check_column(context, bias=True, parts=PARTS)
            check_row(context, bias=False)


@pytest.mark.parametrize(("tp", "sequence_parallel"), LAYOUTS)
def test_outputs_and_gradients_in_chunks_equal_dense(pool: Pool, tp: int, sequence_parallel: bool) -> None:
    """At once, and with weight gradients that are deferred, where the input gradient is summed in chunks too."""
    pool.run(tp, _check, sequence_parallel)


def _pair(context: LayerContext) -> tuple[ColumnParallelLinear, RowParallelLinear, Tensor]:
    up = ColumnParallelLinear(context, INPUT, OUTPUT, bias=True, init=NORMAL)
    down = RowParallelLinear(context, OUTPUT, INPUT, bias=True, init=NORMAL)
    for layer in (up, down):
        fill(layer, context.tp)
    return up, down, residual_part(numbered(S, B, INPUT, seed=1), context).clone()


def _frozen(rank: int, world_size: int, sequence_parallel: bool) -> None:
    whole = context_of(world_size, sequence_parallel)
    for trains_input, trains in ((True, ()), (True, ("up",)), (False, ("down",)), (False, ("up", "down"))):
        found = []
        for context in (whole, replace(whole, overlap_chunks=3)):
            up, down, x = _pair(context)
            layers = {"up": up, "down": down}
            for name, layer in layers.items():
                layer.requires_grad_(name in trains)
            x.requires_grad_(trains_input)
            down(up(x)).square().sum().backward()
            weights = [one.parameter.grad for layer in layers.values() for one in declared_parameters(layer).values()]
            found.append([x.grad, *weights])
        for mine, wanted in zip(*found, strict=True):
            assert (mine is None) == (wanted is None), f"trained: {trains}, input: {trains_input}"
            if mine is not None:
                torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_frozen_layers_have_the_gradients_that_they_have_without_chunks(pool: Pool, sequence_parallel: bool) -> None:
    pool.run(2, _frozen, sequence_parallel)


def _counts(rank: int, world_size: int, sequence_parallel: bool, chunks: int, defers: bool) -> list[Any]:
    context = replace(context_of(world_size, sequence_parallel), overlap_chunks=chunks)
    up, down, x = _pair(context)
    y = down(up(x.requires_grad_()))
    forward = context.tp.meter.read()
    context.tp.meter.reset()
    if defers:
        with context.sink.defer():
            y.backward(torch.ones_like(y))
    else:
        y.backward(torch.ones_like(y))
    return [forward, context.tp.meter.read()]


@pytest.mark.parametrize("defers", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_as_many_bytes_are_sent_in_as_many_calls_as_there_are_chunks(pool: Pool, chunks: int, defers: bool) -> None:
    """With n bytes of [S, B, H] and C chunks: forward C gathers and C reduce-scatters, together n each. Backward C
    gathers of the output's gradient and one of the kept input; a reduce-scatter, in C parts where nothing follows it.

    Source: Korthikanti et al. 2022, section 4.2.2, for one chunk.
    """
    size, sums = S * B * INPUT * 8, chunks if defers else 1
    forward = {("tp", "all_gather"): (chunks, size), ("tp", "reduce_scatter"): (chunks, size)}
    backward = {("tp", "all_gather"): (chunks + 1, 2 * size), ("tp", "reduce_scatter"): (sums, size)}
    assert pool.run(2, _counts, True, chunks, defers) == [[forward, backward]] * 2
    once = [{("tp", "all_reduce"): (calls, size)} for calls in (chunks, sums)]
    assert pool.run(2, _counts, False, chunks, defers) == [once] * 2


def _order(rank: int, world_size: int, sequence_parallel: bool) -> list[str]:
    """Starts and waits of collectives and products of an input-gradient step, in their order, of three chunks."""
    events: list[str] = []
    context = replace(context_of(world_size, sequence_parallel), overlap_chunks=3)
    up, down, x = _pair(context)

    def noted(event: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            events.append(event)
            return real(*args, **options)

        return call

    starts = {"gather": "start_all_gather", "scatter": "start_reduce_scatter", "sum": "start_all_reduce"}
    patches = [mock.patch.object(overlap, name, noted(kind, getattr(overlap, name))) for kind, name in starts.items()]
    patches.append(mock.patch.object(collectives.Pending, "wait", noted("wait", collectives.Pending.wait)))
    for name in ("linear_into", "input_gradient_into", "input_gradient"):
        patches.append(mock.patch.object(context.kernels, name, noted("product", getattr(context.kernels, name))))
    for patch in patches:
        patch.start()
    try:
        y = down(up(x.requires_grad_()))
        events.append("| backward")
        with context.sink.defer():
            y.backward(torch.ones_like(y))
    finally:
        for patch in patches:
            patch.stop()
    return events


GATHERING = "gather gather wait product gather wait product wait product"
SCATTERING = "product scatter product scatter wait product scatter wait wait"
SUMMING = "product sum product sum wait product sum wait wait"


def test_a_chunk_is_on_its_way_while_another_is_multiplied(pool: Pool) -> None:
    """The last wait but one of the backward is for the gathered input, which the weight gradient needs."""
    sequence_parallel = f"{GATHERING} {SCATTERING} | backward {GATHERING} {SCATTERING} wait".split(" ")
    found = [" ".join(events).split(" ") for events in pool.run(2, _order, True)]
    assert found == [sequence_parallel] * 2
    plain = f"product {SUMMING} | backward product {SUMMING}".split(" ")[1:]
    assert [" ".join(events).split(" ") for events in pool.run(2, _order, False)] == [plain] * 2


@given(st.integers(0, 70), st.integers(1, 9))
def test_chunks_hold_every_position_once_in_even_parts(length: int, count: int) -> None:
    context = replace(LayerContext(Axis("tp", 1, 0, (0,), None, Meter()), False, GradSink()), overlap_chunks=count)
    lengths = overlap.chunk_lengths(length, context)
    assert sum(lengths) == length and len(lengths) == min(length, count)
    assert not lengths or (min(lengths) > 0 and max(lengths) - min(lengths) <= 1)


class _Operations(TorchDispatchMode):
    """Counts what is not a view, an allocation or a collective."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view and not {"empty", "view"} & set(re.split(r"[._]", str(func))):
            self.counts[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_off_a_cpu_a_chunk_is_one_product_and_nothing_is_copied_but_one_input(sequence_parallel: bool) -> None:
    """On tensors without memory. The input of the row-parallel layer is copied where its gradient is gathered."""
    group = ShapeOnlyGroup(1, 4, copies=False)
    context = LayerContext(Axis("tp", 4, 1, (0, 1, 2, 3), group, Meter()), sequence_parallel, GradSink())
    up, down, _ = _pair(replace(context, overlap_chunks=4))
    for layer in (up, down):
        for one in declared_parameters(layer).values():
            weight = nn.Parameter(torch.empty(one.spec.local_shape(4), device="meta"))
            one.owner.register_parameter(one.attribute, weight)
            context.sink.bind(weight, torch.empty_like(weight), lambda: None)
    down.bias = None
    x = torch.empty(32 // 4 if sequence_parallel else 32, B, INPUT, device="meta", requires_grad=True)
    with _Operations() as forward:
        y = down(up(x))
    with _Operations() as backward:
        y.backward(torch.empty_like(y))
    weight_gradients = {"addmm_": 2, "sum": 1, "add_": 1}
    if sequence_parallel:
        assert forward.counts == {"baddbmm": 4, "bmm": 4}
        assert backward.counts == {"bmm": 4, "cat": 1, "mm": 1, **weight_gradients}
    else:
        assert forward.counts == {"addmm": 1, "mm": 4}
        assert backward.counts == {"mm": 2, **weight_gradients}
