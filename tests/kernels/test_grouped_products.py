"""The products of several layers, each of its own rows, through either library, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron3d_kernels import Registry, products

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
