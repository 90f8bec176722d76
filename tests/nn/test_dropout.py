"""Dropout: its statistics, and masks that are a function of seed, place and shard and of nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron3d.comm.collectives import gather_values
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.nn.attention import SelfAttention
from megatron3d.nn.block import Block
from megatron3d.nn.dropout import dropout
from megatron3d.nn.inputs import LayerInputs
from megatron3d.params.grads import GradSink
from megatron3d.tensor.context import LayerContext
from tests.dist.pool import Pool
from tests.nn.dense import model_config
from tests.tensor.whole import fill, numbered

ONES = torch.ones(200, 500)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_asked_for_is_dropped_and_the_rest_scaled(probability: float) -> None:
    y = dropout(ONES, probability, seed=1, place="here")
    kept = y > 0
    error = (probability * (1 - probability) / ONES.numel()) ** 0.5
    assert abs(float((~kept).float().mean()) - probability) < 5 * error
    rounding = 2**-17 / (1 - probability)  # of the probability to 16 bits
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - probability)), rtol=1.01 * rounding, atol=0)
    rows = (~kept).float().mean(1)
    assert rows.std() < 2 * (probability * (1 - probability) / 500) ** 0.5, "rows are dropped evenly"


def test_the_same_seed_place_and_shard_drop_the_same_and_any_other_does_not() -> None:
    def mask(seed: int = 1, place: str = "layers.0.mlp", shard: int = 0) -> Tensor:
        return dropout(ONES, 0.5, seed=seed, place=place, shard=shard) > 0

    torch.manual_seed(5)
    first = mask()
    torch.manual_seed(6)
    assert torch.equal(mask(), first), "the global generator has a say"
    others = [mask(seed=2), mask(place="layers.1.mlp"), mask(place="layers.0.attention"), mask(shard=1), mask(shard=2)]
    for number, other in enumerate(others):
        for earlier in [first, *others[:number]]:
            agreement = float((other == earlier).float().mean())
            assert abs(agreement - 0.5) < 5 * 0.5 / ONES.numel() ** 0.5, "unrelated masks agree in half of the places"


def test_the_mask_depends_on_the_place_of_an_element_and_not_on_strides() -> None:
    x = torch.ones(30, 40)
    assert torch.equal(dropout(x.t().contiguous().t(), 0.5, seed=1, place="p"), dropout(x, 0.5, seed=1, place="p"))


def test_the_gradient_is_dropped_and_scaled_like_the_value() -> None:
    x = torch.ones(50, 50, requires_grad=True)
    y = dropout(x, 0.3, seed=1, place="p")
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 4097])
def test_every_count_of_elements_is_masked_to_its_end(count: int) -> None:
    masks = torch.stack([dropout(torch.ones(count), 0.5, seed=seed, place="p") > 0 for seed in range(200)])
    assert (masks.float().mean(0) - 0.5).abs().max() < 0.25, "each element is kept in about half of the draws"


def test_the_smallest_and_largest_probabilities_round_to_none_and_to_nearly_all() -> None:
    assert torch.equal(dropout(ONES, 1e-6, seed=1, place="p"), ONES)
    assert torch.isfinite(dropout(ONES, 1 - 1e-9, seed=1, place="p")).all()


def test_no_seed_or_no_probability_drops_nothing() -> None:
    assert dropout(ONES, 0.5, seed=None, place="p") is ONES
    assert dropout(ONES, 0.0, seed=1, place="p") is ONES


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    dropout(ONES, 0.5, seed=1, place="p")
    assert torch.equal(torch.random.get_rng_state(), before)


DROPPING = model_config(hidden_dropout=0.2, attention_dropout=0.3)


def attention(layer: int = 0, *, recompute_core: bool = False) -> SelfAttention:
    context = LayerContext(make_mesh(Layout()).tp, False, GradSink())
    module = SelfAttention(DROPPING, context, layer=layer, recompute_core=recompute_core)
    fill(module, context.tp, dtype=torch.float32)
    return module


def run_attention(module: SelfAttention, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
    x = numbered(8, 4, 16, seed=1, dtype=torch.float32).requires_grad_()
    y = module(x, LayerInputs(dropout_seed=seed))
    y.square().sum().backward()
    grad, module.qkv.weight.grad = module.qkv.weight.grad, None
    return y.detach(), x.grad, grad


def test_attention_dropout_is_a_function_of_seed_and_layer_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = run_attention(attention(), 7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first, run_attention(attention(), 7)))
    assert not torch.equal(first[0], run_attention(attention(), 8)[0])
    assert not torch.equal(first[0], run_attention(attention(layer=1), 7)[0])
    assert not torch.equal(first[0], run_attention(attention(), None)[0])


def test_recomputed_attention_draws_the_same_mask_again() -> None:
    plain, recomputed = run_attention(attention(), 7), run_attention(attention(recompute_core=True), 7)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))


def test_attention_dropout_keeps_the_mean_of_the_values() -> None:
    """With values of one, each output is the sum of the kept probabilities over 1 - p: one on average."""
    config = replace(DROPPING, attention_dropout=0.3)
    context = LayerContext(make_mesh(Layout()).tp, False, GradSink())
    module = SelfAttention(config, context, layer=0)
    fill(module, context.tp, dtype=torch.float32)
    q, ones = torch.zeros(16, 4, 32, 4), torch.ones(16, 4, 32, 4)
    means = torch.stack(
        [module._core(q, q, ones, LayerInputs(dropout_seed=seed))[:, :, 8:, 0].mean() for seed in range(20)]
    )
    # 16 x 4 x 24 rows of at least 9 equal probabilities a seed: a standard error under 0.3 / sqrt(1536 x 20 x 9) x 1.6.
    assert abs(float(means.mean()) - 1.0) < 0.01
    assert float(means.std()) > 0, "nothing was dropped"


def _residual_agreement(rank: int, world_size: int, sequence_parallel: bool) -> list[Tensor]:
    axis = make_mesh(Layout(tp=world_size)).tp
    block = Block(DROPPING, LayerContext(axis, sequence_parallel, GradSink()), layer=0)
    fill(block, axis, dtype=torch.float32)
    rows = 8 // world_size if sequence_parallel else 8
    y = block(torch.ones(rows, 2, 16), LayerInputs(dropout_seed=3)).detach()
    dropped = block._drop(torch.ones(rows, 2, 16), LayerInputs(dropout_seed=3), "mlp")
    return gather_values((y, dropped), axis)


def test_ranks_that_hold_the_same_residual_stream_drop_the_same(pool: Pool) -> None:
    for everyone in pool.run(2, _residual_agreement, False):
        (first, first_mask), (second, second_mask) = everyone
        assert torch.equal(first, second) and torch.equal(first_mask, second_mask)


def test_ranks_that_hold_parts_of_the_sequence_drop_differently(pool: Pool) -> None:
    for everyone in pool.run(2, _residual_agreement, True):
        (_, first_mask), (_, second_mask) = everyone
        assert not torch.equal(first_mask, second_mask)
