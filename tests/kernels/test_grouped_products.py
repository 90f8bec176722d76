"""The products of several layers, each of its own rows, through either library, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron3d_kernels import Registry, products
from megatron3d_kernels.grouped_products import stacked
from megatron3d_kernels.launch import KernelError
from torch import Tensor

NOISE = 1e-5


@pytest.mark.parametrize("library", products.LIBRARIES)
@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    has_bias=st.booleans(),
)
def test_each_layer_multiplies_its_own_rows(
    library: str, counts: list[int], inputs: int, outputs: int, has_bias: bool
) -> None:
    draw, kernels = torch.Generator().manual_seed(len(counts)), Registry(library=library)
    x_RI, grad_RO = (torch.randn(sum(counts), width, generator=draw) for width in (inputs, outputs))
    weights = [torch.randn(outputs, inputs, generator=draw) for _ in counts]
    biases = [torch.randn(outputs, generator=draw) if has_bias else None for _ in counts]
    layer_R = [number for number, count in enumerate(counts) for _ in range(count)]
    y_RO = kernels.grouped_linear(x_RI, weights, biases, counts)
    grad_RI = kernels.grouped_input_gradient(grad_RO, weights, counts)
    assert y_RO.shape == grad_RO.shape and grad_RI.shape == x_RI.shape
    for row, number in enumerate(layer_R):
        bias = torch.zeros(outputs) if biases[number] is None else biases[number]
        expected = weights[number].double() @ x_RI[row].double() + bias.double()
        torch.testing.assert_close(y_RO[row].double(), expected, rtol=NOISE, atol=NOISE)
        expected = grad_RO[row].double() @ weights[number].double()
        torch.testing.assert_close(grad_RI[row].double(), expected, rtol=NOISE, atol=NOISE)


OUT, IN = 8, 12
EVEN, UNEVEN = [4, 4, 4], [3, 0, 6]


def in_one_buffer(draw: torch.Generator, shape: tuple[int, ...], *, gap: int = 12) -> list[Tensor]:
    """Three tensors at equal distances."""
    size = math.prod(shape)
    flat = torch.randn(3, size + gap, generator=draw)
    return [one[:size].view(shape) for one in flat]


@pytest.mark.parametrize(
    ("way", "counts"), [("batched", EVEN), ("batched", UNEVEN), ("grouped", EVEN), ("grouped", UNEVEN), (None, EVEN)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_way_multiplies_as_the_loop_does(way: str | None, counts: list[int], has_bias: bool) -> None:
    draw = torch.Generator().manual_seed(sum(counts))
    x_RI, weights = torch.randn(sum(counts), IN, generator=draw), in_one_buffer(draw, (OUT, IN))
    biases = in_one_buffer(draw, (OUT,)) if has_bias else [None] * 3
    spread_RO = torch.randn(OUT, generator=draw).expand(sum(counts), OUT)  # as the gradient of a sum comes
    kernels, loop = Registry(grouped=way), Registry(grouped="looped")
    exactly = way == "grouped" and not has_bias
    near = {"rtol": 0, "atol": 0} if exactly else {"rtol": NOISE, "atol": NOISE}
    found, expected = (one.grouped_linear(x_RI, weights, biases, counts) for one in (kernels, loop))
    torch.testing.assert_close(found, expected, **near)
    found, expected = (one.grouped_input_gradient(spread_RO, weights, counts) for one in (kernels, loop))
    torch.testing.assert_close(found, expected, **near)
    for overwrites in ([True] * 3, [False] * 3, [True, False, True]):
        before = in_one_buffer(draw, (OUT, IN))
        copies = [one.clone() for one in before]
        kernels.add_grouped_weight_gradients(before, spread_RO, x_RI, counts, overwrites=overwrites)
        rows = zip(before, copies, spread_RO.split(counts), x_RI.split(counts), overwrites, strict=True)
        for buffer, copy, grad, x, overwrite in rows:
            wanted = grad.double().t() @ x.double() + (0 if overwrite else copy.double())
            torch.testing.assert_close(buffer.double(), wanted, rtol=NOISE, atol=NOISE)


def test_weights_at_equal_distances_are_read_where_they_lie() -> None:
    weights = in_one_buffer(torch.Generator().manual_seed(1), (OUT, IN))
    found = stacked(weights)
    assert found is not None and found.data_ptr() == weights[0].data_ptr()
    assert all(torch.equal(one, other) for one, other in zip(found, weights, strict=True))
    assert stacked([weights[0], weights[2], weights[1]]) is None
    assert stacked([weights[0], weights[1].clone()]) is None


def test_a_way_that_is_none_is_refused() -> None:
    with pytest.raises(KernelError, match="no way 'quick' to make grouped products; use one of looped, batched"):
        Registry(grouped="quick")
