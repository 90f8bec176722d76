"""What experts with a capacity keep, against a loop over sequences, and where ranks have parts of sequences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron3d_kernels.dropout import child_keys
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.moe.capacity import capacity_of, kept_choices
from megatron3d.moe.router import Router, TokenPlaces
from megatron3d.tensor.context import unsharded_context
from tests.dist.pool import Pool
from tests.nn.dense import model_config


def drawn(positions: int, samples: int, experts: int, chosen: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Experts, weights (few values, so that some are equal) and samples of tokens that stand position by position."""
    draw = torch.Generator().manual_seed(seed)
    tokens = positions * samples
    expert_TK = torch.rand(tokens, experts, generator=draw).topk(chosen).indices.sort().values
    weight_TK = torch.randint(1, 4, (tokens, chosen), generator=draw) / 4
    return expert_TK, weight_TK, torch.arange(samples).repeat(positions)


def by_hand(
    expert_TK: Tensor, priority_TK: Tensor | None, sample_T: Tensor, *, capacity: int, num_experts: int
) -> Tensor:
    kept = torch.zeros_like(expert_TK, dtype=torch.bool)
    for sample in range(int(sample_T.max()) + 1):
        for expert in range(num_experts):
            found = [
                (0 if priority_TK is None else -priority_TK[t, k].item(), t, k)
                for t, k in (expert_TK == expert).nonzero().tolist()
                if sample_T[t] == sample
            ]
            for _, t, k in sorted(found)[:capacity]:
                kept[t, k] = True
    return kept


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 9),
    samples=st.integers(1, 3),
    chosen=st.integers(1, 4),
    capacity=st.integers(1, 5),
    by_weight=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_first_of_each_sequence_are_kept(
    positions: int, samples: int, chosen: int, capacity: int, by_weight: bool, seed: int
) -> None:
    expert_TK, weight_TK, sample_T = drawn(positions, samples, 4, chosen, seed)
    tokens = (expert_TK, weight_TK if by_weight else None, sample_T)
    how = {"capacity": capacity, "num_experts": 4}
    assert torch.equal(kept_choices(*tokens, **how, tp=make_mesh(Layout()).tp), by_hand(*tokens, **how))


def kept_by_rank(rank: int, world_size: int) -> list[Tensor]:
    tp = make_mesh(Layout(tp=world_size)).tp
    expert_TK, weight_TK, sample_T = (whole.chunk(world_size)[rank] for whole in drawn(6, 2, 4, 2, 0))
    how = {"capacity": 2, "num_experts": 4, "tp": tp}
    return [kept_choices(expert_TK, priority, sample_T, **how) for priority in (weight_TK, None)]


def test_ranks_with_parts_of_sequences_keep_the_same(pool: Pool) -> None:
    alone = kept_by_rank(0, 1)
    for number, whole in enumerate(alone):
        assert 0 < int(whole.sum()) < whole.numel()
        assert torch.equal(torch.cat([found[number] for found in pool.run(2, kept_by_rank)]), whole)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_a_capacity_is_that_of_an_even_load_times_the_factor(factor: float) -> None:
    config = model_config(num_experts=8, moe_router_topk=3, moe_expert_capacity_factor=factor, moe_min_capacity=2)
    assert capacity_of(config, 8, 10) == max(2, math.ceil(3 * 10 / 8 * factor))
    assert capacity_of(model_config(num_experts=8), 8, 10) is None


@pytest.mark.parametrize(("factor", "least"), [(1e300, 0), (1.7e308, 0), (1.0, 2**63 - 1)])
def test_a_capacity_is_at_most_the_length_of_the_sequence(factor: float, least: int) -> None:
    config = model_config(num_experts=4, moe_expert_capacity_factor=factor, moe_min_capacity=least)
    assert capacity_of(config, 4, 16) == 16


def test_random_selection_keeps_other_tokens_in_each_step_and_in_an_evaluation_those_of_largest_weight() -> None:
    config = model_config(
        num_experts=4,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_expert_capacity_factor=1.0,
        moe_token_drop_policy="random",
    )
    router = Router(config, unsharded_context(), num_experts=4)
    tokens = 64
    expert_TK = torch.zeros(tokens, 1, dtype=torch.int64)
    weight_TK = torch.linspace(0, 1, tokens).unsqueeze(1)

    def kept(step: int | None) -> list[int]:
        keys_T = None if step is None else child_keys(step, torch.arange(tokens))
        keys = None if keys_T is None else lambda: keys_T
        places = TokenPlaces(torch.zeros(tokens, dtype=torch.int64), 1, tokens, keys, None)
        found = router.keep(expert_TK, weight_TK, places)
        assert found is not None
        return found[:, 0].nonzero()[:, 0].tolist()

    largest = list(range(48, 64))
    assert kept(None) == largest
    by_step = [kept(step) for step in range(40)]
    assert all(len(one) == 16 for one in by_step) and kept(0) == by_step[0] != by_step[1]
    times = torch.tensor([token for one in by_step for token in one]).bincount(minlength=tokens)
    assert times.min() > 0 and times.max() < 30, "each token has one chance in four"
