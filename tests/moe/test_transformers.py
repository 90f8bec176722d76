"""A mixture of experts against the layers of transformers, values and gradients.

Its own file, since importing transformers takes the workers of other tests some seconds.
"""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from tests.moe.test_layer import GATED, E, F, H, K, hidden, layer_of, run, weights_of_outputs, wide

NEAR = 1e-6  # transformers computes softmax in fp32
THEIRS = {
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K),
        {},
    ),
    "qwen3": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(
            hidden_size=H, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False
        ),
        {"moe_router_pre_softmax": True},
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_outputs_and_gradients_are_those_of_transformers(name: str) -> None:
    with wide():
        check(name)


def check(name: str) -> None:
    """All of one family, in float64."""
    block, their_config, changes = THEIRS[name]
    _, layer = layer_of(**GATED, **changes)
    theirs = block(their_config)
    with torch.no_grad():
        theirs.gate.weight.copy_(layer.router.weight)
        for i in range(E):
            theirs.experts.gate_up_proj[i].copy_(layer.experts[str(i)].up.weight)
            theirs.experts.down_proj[i].copy_(layer.experts[str(i)].down.weight)
    y_SBH, gradients = run(layer)
    x_BSH = hidden().transpose(0, 1).contiguous().requires_grad_()
    found = theirs(x_BSH)
    y_BSH = found[0] if isinstance(found, tuple) else found
    (y_BSH * weights_of_outputs().transpose(0, 1)).sum().backward()
    torch.testing.assert_close(y_SBH, y_BSH.detach().transpose(0, 1), rtol=0, atol=NEAR)
    torch.testing.assert_close(gradients["x"], x_BSH.grad.transpose(0, 1), rtol=0, atol=10 * NEAR)
    torch.testing.assert_close(gradients["router.weight"], theirs.gate.weight.grad, rtol=0, atol=10 * NEAR)
    for i in range(E):
        want = theirs.experts.down_proj.grad[i]
        torch.testing.assert_close(gradients[f"experts.{i}.down.weight"], want, rtol=0, atol=10 * NEAR)
