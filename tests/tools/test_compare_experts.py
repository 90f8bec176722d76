"""The comparison of experts with dense models: what its curves say, and how its models relate."""

from __future__ import annotations

import pytest

from megatron3d.models.counts import num_parameters
from megatron3d.models.flops import flops_per_token
from tools.bench.compare_experts import DENSE, EXPERTS, LARGE, model_of
from tools.bench.curves import Curve


def test_a_loss_is_reached_on_the_straight_line_between_two_evaluations() -> None:
    curve = Curve("one", [10, 20, 30], [[4.0, 2.0, 1.0], [4.0, 4.0, 2.0]], 2.0)
    assert curve.mean == [4.0, 3.0, 1.5] and curve.flops == 60.0
    assert [curve.tokens_to(loss) for loss in (5.0, 4.0, 3.5, 3.0, 2.25, 1.5)] == [10, 10, 15, 20, 25, 30]
    assert curve.tokens_to(1.4) is None


def test_experts_compute_what_the_dense_model_does_and_the_large_one_several_times_that() -> None:
    dense, experts, large = (model_of(one) for one in (DENSE, EXPERTS, LARGE))
    router = 3 * 2 * 4 * experts.hidden_size * (experts.num_experts or 0)  # the scores of all experts in four layers
    assert flops_per_token(experts) - router == pytest.approx(flops_per_token(dense))
    assert flops_per_token(large) > 3 * flops_per_token(dense)
    assert num_parameters(experts) > 3 * num_parameters(dense)
