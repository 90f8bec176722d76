"""The volume of a step and what it costs under a pipeline, against the paper's figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.params.gate import WeightUse
from megatron3d.zero.policy import POLICIES
from megatron3d.zero.volume import gathered_elements, pipeline_cost, step_volume


@given(st.integers(1, 64), st.integers(1, 10**12))
def test_volumes_are_those_of_the_paper(micros: int, psi: int) -> None:
    """Rajbhandari et al. 2020, section 7: 2 Psi for stages 1 and 2 and 3 Psi for stage 3, with one micro-batch."""
    moved = {}
    for stage, policy in POLICIES.items():
        volume = step_volume(policy, num_microbatches=micros, weight_bytes=psi, gradient_bytes=psi)
        moved[stage] = volume.reduced_bytes + volume.gathered_bytes
    assert moved == {0: psi, 1: 2 * psi, 2: (micros + 1) * psi, 3: 3 * micros * psi}


def test_what_places_read_is_counted_once_a_direction() -> None:
    places = {
        0: {"embedding": WeightUse(("word", "rest"), ("rest",)), "l": WeightUse(("l",), ("l",))},
        3: {"head": WeightUse(("norm", "word"), ("norm", "word"))},
    }
    lengths = {"word": 1000, "rest": 100, "l": 10, "norm": 1}
    assert gathered_elements(places, lengths) == (1000 + 2 * 100) + 2 * 10 + 2 * (1 + 1000)


@pytest.mark.parametrize("stage", POLICIES)
def test_only_sharded_gradients_or_weights_under_a_pipeline_cost_more(stage: int) -> None:
    policy = POLICIES[stage]
    volume = step_volume(policy, num_microbatches=8, weight_bytes=2 * 10**9, gradient_bytes=4 * 10**9)
    assert pipeline_cost(policy, volume, num_stages=1, dp=4) is None
    assert pipeline_cost(policy, volume, num_stages=4, dp=1) is None
    said = pipeline_cost(policy, volume, num_stages=4, dp=4)
    if stage < 2:
        assert said is None
    else:
        assert said is not None and "8 reductions of all gradients a step (32 GB), not 1" in said
        assert ("16 gathers of all weights (32 GB), not 1" in said) == (stage == 3)
        assert said.endswith("--zero-stage 1 does without")
