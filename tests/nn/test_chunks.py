"""An MLP in chunks of the sequence has the results of one chunk, and no wider tensor than a chunk's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.sections.model import ModelConfig
from megatron3d.nn.mlp import MLP
from megatron3d.params.grads import GradSink
from megatron3d.params.module import declared_parameters
from megatron3d.tensor.context import LayerContext
from tests.largest_result import LargestResult
from tests.nn.dense import model_config
from tests.tensor.full import fill, numbered

S, B, H, F = 12, 2, 16, 64
CONFIGS = {"gelu": model_config(ffn_hidden_size=F), "swiglu": model_config(ffn_hidden_size=F, activation="swiglu")}


def results(config: ModelConfig, num_chunks: int) -> tuple[list[Tensor], list[int]]:
    """Output, gradients of input and parameters; and how often a gradient of each parameter arrived."""
    sink = GradSink()
    module = MLP(config, LayerContext(make_mesh(Layout()).tp, False, sink), num_chunks=num_chunks)
    fill(module, make_mesh(Layout()).tp, dtype=torch.float32)
    parameters = [one.parameter for one in declared_parameters(module).values()]
    buffers, arrived = [torch.zeros_like(one) for one in parameters], [0] * len(parameters)

    def arrive(number: int) -> None:
        arrived[number] += 1

    for number, (parameter, buffer) in enumerate(zip(parameters, buffers, strict=True)):
        sink.bind(parameter, buffer, lambda number=number: arrive(number))
    x = numbered(S, B, H, seed=1, dtype=torch.float32).requires_grad_()
    y = module(x)
    (y * numbered(S, B, H, seed=2, dtype=torch.float32)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *buffers], arrived


@pytest.mark.parametrize("name", CONFIGS)
def test_results_do_not_depend_on_the_number_of_chunks_and_each_gradient_arrives_once(name: str) -> None:
    expected, _ = results(CONFIGS[name], 1)
    for num_chunks in (2, 5, 12, 100):
        found, arrived = results(CONFIGS[name], num_chunks)
        assert set(arrived) == {1}
        for a, b in zip(expected, found, strict=True):
            assert (a - b).abs().max() <= 1e-6 * a.abs().max()


def _is_wide(one: Tensor) -> bool:
    """Whether a result is as wide as the inner layer, and neither a weight nor the gradient of one."""
    return one.dim() == 3 and one.shape[-1] >= F


@pytest.mark.parametrize("name", CONFIGS)
def test_no_inner_tensor_is_longer_than_a_chunk(name: str) -> None:
    wide = 2 * F if CONFIGS[name].is_gated else F
    for num_chunks in (1, 3):
        with LargestResult(_is_wide) as seen:
            results(CONFIGS[name], num_chunks)
        assert seen.elements == S // num_chunks * B * wide
