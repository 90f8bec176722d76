"""GradSink: contributions add up in the right buffer whatever their path, and each is announced once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron3d.params.grads import GradSink
from megatron3d.params.row_blocks import RowBlock
from megatron3d.planner.kernels_without_memory import GpuKernels


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))


def bound(sink: GradSink, weight: nn.Parameter, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    buffer, arrivals = torch.zeros(weight.shape, dtype=dtype), []
    sink.bind(weight, buffer, lambda: arrivals.append(1))
    return buffer, arrivals


def test_unbound_parameters_accumulate_into_grad_without_changing_what_was_given() -> None:
    sink, weight = GradSink(), parameter(3)
    first, second = torch.ones(3), torch.full((3,), 2.0)
    sink.add(weight, first)
    sink.add(weight, second)
    assert weight.grad.tolist() == [3.0] * 3
    assert first.tolist() == [1.0] * 3 and second.tolist() == [2.0] * 3


def test_contributions_by_hand_and_from_autograd_meet_in_one_buffer() -> None:
    sink, weight = GradSink(), parameter(3)
    buffer, arrivals = bound(sink, weight, torch.float32)
    sink.add(weight, torch.ones(3))
    (weight * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    (weight * 10.0).sum().backward()
    assert buffer.tolist() == [12.0, 13.0, 14.0]
    assert len(arrivals) == 3 and weight.grad is None


def test_a_parameter_used_twice_in_one_graph_arrives_once_with_both() -> None:
    sink, weight = GradSink(), parameter(3)
    buffer, arrivals = bound(sink, weight, torch.float32)
    (weight * 2.0 + weight * 3.0).sum().backward()
    assert buffer.tolist() == [5.0] * 3 and len(arrivals) == 1


def test_linear_gradients_equal_those_of_autograd() -> None:
    sink, weight, bias = GradSink(), parameter(5, 4), parameter(5)
    buffers = [bound(sink, one, torch.float32) for one in (weight, bias)]
    x, grad = torch.randn(3, 2, 4), torch.randn(3, 2, 5)
    leaves = [one.detach().clone().requires_grad_() for one in (weight, bias)]
    for _ in range(2):
        sink.add_linear(weight, bias, grad, x)
        torch.nn.functional.linear(x, *leaves).backward(grad)
    for (buffer, arrivals), leaf in zip(buffers, leaves):
        torch.testing.assert_close(buffer, leaf.grad)
        assert len(arrivals) == 2


ROWS = torch.tensor([4, 0, 4, 2])


class Launches(TorchDispatchMode):
    """The operations that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or "empty" in str(func) or func is torch.ops.aten._unsafe_view.default):
            self.names.append(str(func).removeprefix("aten."))
        return out


@dataclass(frozen=True)
class TwoBlocks:
    """A table of 6 rows in blocks of 3, [3, 4] each."""

    buffer: torch.Tensor
    blocks: tuple[RowBlock, ...] = (RowBlock(1, 6, 0, 3), RowBlock(1, 6, 3, 6))

    def buffers(self) -> Iterator[tuple[RowBlock, torch.Tensor]]:
        return ((block, self.buffer[block.start : block.stop]) for block in self.blocks)

    def add_rows(self, rows: torch.Tensor, grad_rows: torch.Tensor) -> None:
        raise AssertionError("no rows are looked up here")


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 refuses these products for tensors without memory")
@pytest.mark.parametrize("way", ["layer", "experts", "deferred", "blocks"])
def test_on_a_gpu_narrow_weight_gradients_reach_fp32_buffers_without_a_pass_of_their_own(way: str) -> None:
    """One product for each weight and micro-batch, whichever way it comes, and nothing that adds or converts."""
    sink, kernels = GradSink(), GpuKernels()
    weights = [nn.Parameter(torch.empty(6, 4, dtype=torch.bfloat16, device="meta")) for _ in range(2)]
    for weight in weights:
        buffer = torch.empty(6, 4, device="meta")
        if way == "blocks":
            sink.bind_blocks(weight, TwoBlocks(buffer), lambda: None)
        else:
            sink.bind(weight, buffer, lambda: None).is_empty = True
    grad, x = (torch.empty(5, width, dtype=torch.bfloat16, device="meta") for width in (6, 4))
    with Launches() as seen:
        for _ in range(2):
            with sink.defer() if way == "deferred" else nullcontext([]) as works:
                if way == "experts":
                    sink.add_grouped_linear(weights, [None, None], grad, x, [3, 2], kernels=kernels)
                else:
                    for weight in weights:
                        sink.add_linear(weight, None, grad, x, kernels=kernels)
            for work in works:
                work()
    first, second = ["mm.dtype_out"] * 2, ["addmm.dtype_out"] * 2
    assert seen.names == (4 * first if way == "blocks" else first + second)


@pytest.mark.parametrize("way", ["product", "product of another dtype", "by hand", "rows", "autograd"])
def test_the_first_contribution_to_an_empty_place_overwrites_and_later_ones_add(way: str) -> None:
    """Whichever way it comes; the buffer is full of NaN, which no sum would get rid of."""
    sink, weight = GradSink(), parameter(5, 3)
    buffer = torch.full((5, 3), torch.nan, dtype=torch.float64 if "another" in way else torch.float32)
    place = sink.bind(weight, buffer, lambda: None)
    grad_TO, x_TI = torch.ones(4, 5), torch.ones(4, 3)
    contributions = {
        "by hand": lambda: sink.add(weight, torch.ones(5, 3)),
        "rows": lambda: sink.add_rows(weight, torch.arange(5), torch.ones(5, 3)),
        "autograd": lambda: weight.sum().backward(),
    }
    contribute = contributions.get(way, lambda: sink.add_linear(weight, None, grad_TO / 4, x_TI))
    place.is_empty = True
    for count in (1, 2):
        contribute()
        assert buffer.tolist() == [[float(count)] * 3] * 5 and not place.is_empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_rows_equal_those_of_autograd_and_add_up_in_the_buffers_dtype(dtype: torch.dtype) -> None:
    sink, table = GradSink(), parameter(5, 3, dtype=dtype)
    buffer, arrivals = bound(sink, table, torch.float32)
    grads = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 2)]
    leaf = table.detach().float().requires_grad_()
    for grad in grads:
        sink.add_rows(table, ROWS, grad)
        torch.nn.functional.embedding(ROWS, leaf).backward(grad.float())
    torch.testing.assert_close(buffer, leaf.grad, rtol=1e-6, atol=0)
    assert len(arrivals) == 2 and table.grad is None
    unbound = GradSink()
    unbound.add_rows(table, ROWS, grads[0])
    unbound.add_rows(table, ROWS, grads[1])
    torch.testing.assert_close(table.grad.float(), leaf.grad, rtol=0.02 if dtype == torch.bfloat16 else 1e-6, atol=1e-2)


@pytest.mark.parametrize(("late", "waiting"), [(False, 0), (True, 1)])
def test_gradients_of_rows_wait_for_the_weight_gradient_step_only_where_the_buffer_does(
    late: bool, waiting: int
) -> None:
    sink, table, buffer, arrivals = GradSink(), parameter(5, 3), torch.zeros(5, 3), []
    if late:
        sink.bind_late(table, lambda: buffer, lambda: arrivals.append(1))
    else:
        sink.bind(table, buffer, lambda: arrivals.append(1))
    with sink.defer() as work:
        sink.add_rows(table, ROWS, torch.ones(4, 3))
    assert len(work) == waiting and len(arrivals) == 1 - waiting
    for one in work:
        one()
    assert buffer.sum(1).tolist() == [3.0, 0.0, 3.0, 0.0, 6.0] and len(arrivals) == 1


@pytest.mark.parametrize(("buffer_dtype", "kept"), [(torch.float32, True), (torch.bfloat16, False)])
def test_an_fp32_buffer_keeps_the_small_terms_that_a_bf16_one_loses(buffer_dtype: torch.dtype, kept: bool) -> None:
    sink, weight = GradSink(), parameter(1, dtype=torch.bfloat16)
    buffer, _ = bound(sink, weight, buffer_dtype)
    sink.add(weight, torch.tensor([256.0], dtype=torch.bfloat16))
    for _ in range(100):
        sink.add(weight, torch.tensor([0.5], dtype=torch.bfloat16))
    assert float(buffer) == (306.0 if kept else 256.0)


def test_deferred_work_waits_in_order_and_runs_when_called() -> None:
    sink, first, second = GradSink(), parameter(2, 2), parameter(2, 2)
    seen: list[str] = []
    for name, weight in (("first", first), ("second", second)):
        sink.bind(weight, torch.zeros(2, 2), lambda name=name: seen.append(name))
    x = torch.ones(1, 2)
    with sink.defer() as outer:
        sink.add_linear(first, None, x, x)
        with sink.defer() as inner:
            sink.add_linear(second, None, x, x)
        sink.add_linear(second, None, x, x)
    assert seen == [] and (len(outer), len(inner)) == (2, 1)
    sink.add_linear(first, None, x, x)
    assert seen == ["first"], "after the context work is done at once again"
    for work in [*outer, *inner]:
        work()
    assert seen == ["first", "first", "second", "second"]


def test_an_error_inside_leaves_the_sink_working_at_once() -> None:
    sink, weight = GradSink(), parameter(2, 2)
    with pytest.raises(KeyError), sink.defer():
        raise KeyError("a layer failed")
    sink.add_linear(weight, None, torch.ones(1, 2), torch.ones(1, 2))
    assert weight.grad is not None


def test_parameters_that_come_by_autograd_are_not_deferred() -> None:
    sink, weight = GradSink(), parameter(3)
    buffer, arrivals = bound(sink, weight, torch.float32)
    with sink.defer() as work:
        weight.sum().backward()
    assert work == [] and buffer.tolist() == [1.0] * 3 and len(arrivals) == 1


def test_late_buffers_are_asked_for_at_each_contribution() -> None:
    sink, weight = GradSink(), parameter(2, 3)
    buffers: list[torch.Tensor] = []

    def fresh() -> torch.Tensor:
        buffers.append(torch.zeros(2, 3))
        return buffers[-1]

    arrivals: list[int] = []
    sink.bind_late(weight, fresh, lambda: arrivals.append(len(buffers)))
    for _ in range(2):
        sink.add_linear(weight, None, torch.ones(4, 2), torch.ones(4, 3))
        (weight * 2.0).sum().backward()
    assert [float(buffer[0, 0]) for buffer in buffers] == [4.0, 2.0, 4.0, 2.0]
    assert arrivals == [1, 2, 3, 4] and weight.grad is None


def test_gradients_for_late_buffers_wait_for_the_weight_gradient_step_even_those_of_autograd() -> None:
    sink, norm, linear = GradSink(), parameter(3), parameter(2, 2)
    buffers = {norm: torch.zeros(3), linear: torch.zeros(2, 2)}
    arrivals: list[str] = []
    sink.bind_late(norm, lambda: buffers[norm], lambda: arrivals.append("norm"))
    sink.bind_late(linear, lambda: buffers[linear], lambda: arrivals.append("linear"))
    with sink.defer() as work:
        norm.sum().backward()
        sink.add_linear(linear, None, torch.ones(1, 2), torch.ones(1, 2))
    assert arrivals == [] and norm.grad is None
    for one in work:
        one()
    assert arrivals == ["norm", "linear"] and buffers[norm].tolist() == [1.0] * 3
