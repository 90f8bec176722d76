"""Norms whose weights are stored less 1: the same function, with a finer grid in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.nn.norm import Norm
from megatron3d.params.grads import GradSink
from megatron3d.tensor.context import LayerContext
from tests.nn.dense import model_config
from tests.runs import harness

SIZE = 16


def norm_of(**changes: Any) -> Norm:
    """A norm of `SIZE` in one process."""
    config = model_config(apply_layernorm_1p=True, **changes)
    context = LayerContext(make_mesh(Layout()).tp, False, GradSink())
    return Norm(config, context, SIZE, tp_gradient="equal")


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_a_stored_weight_of_w_scales_by_1_plus_w(normalization: str) -> None:
    norm = norm_of(normalization=normalization, norm_epsilon=1e-5)
    x = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1))
    stored = torch.linspace(-0.5, 0.5, SIZE)
    bias = torch.linspace(0.1, 0.2, SIZE)
    norm.weight = nn.Parameter(stored)
    if normalization == "LayerNorm":
        norm.bias = nn.Parameter(bias)
        expected = F.layer_norm(x, (SIZE,), 1 + stored, bias, 1e-5)
    else:
        expected = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + stored)
    torch.testing.assert_close(norm(x), expected)


def test_a_small_stored_weight_is_not_rounded_away_in_bf16() -> None:
    norm = norm_of(normalization="RMSNorm")
    # 1 + 2^-12 is 1 in bf16.
    norm.weight = nn.Parameter(torch.full((SIZE,), 2.0**-12, dtype=torch.bfloat16))
    x = torch.ones(1, SIZE)
    assert float(norm(x).detach()[0, 0]) > 1.0001


def test_training_with_it_gives_the_losses_of_training_without(tmp_path: Path) -> None:
    """Adam's update of w is that of 1 + w, and norms do not decay; fp32 rounds 1 + w in another place."""
    found = {}
    for name, option in (("whole", ""), ("less one", "--apply-layernorm-1p")):
        file = tmp_path / f"{name}.jsonl"
        harness.run_ok(harness.MOCK, "--lr 1e-2 --metrics-file", file, option)
        found[name] = harness.losses(file)
    assert found["less one"] == pytest.approx(found["whole"], rel=1e-5)
    assert found["whole"][-1] != found["whole"][0]
