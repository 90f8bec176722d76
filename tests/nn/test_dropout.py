"""Dropout by place: masks that follow seed, site, sample, head and position, and do not see who computes them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from megatron3d.comm.collectives import gather_values
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.nn.attention import SelfAttention
from megatron3d.nn.attention_core import Masking, ProbabilityDropout, attend, draws_by_place
from megatron3d.nn.block import Block
from megatron3d.nn.dropout import DropoutStream, drop_hidden, drop_samples, step_seed
from megatron3d.nn.inputs import LayerInputs
from megatron3d.params.grads import GradSink
from megatron3d.tensor.context import LayerContext
from tests.dist.pool import Pool
from tests.nn.dense import model_config
from tests.tensor.full import fill, numbered

S, B, H, N, D = 8, 4, 16, 4, 4
ONES = torch.ones(S, B, H)
DROPPING = model_config(hidden_dropout=0.2, attention_dropout=0.3)


def context_of(tp: int = 1, sequence_parallel: bool = False) -> LayerContext:
    return LayerContext(make_mesh(Layout(tp=tp)).tp, sequence_parallel, GradSink())


def hidden(
    x_SBH: Tensor = ONES, *, seed: int = 7, first_sample: int = 0, site: str = "layers.0.mlp", first_position: int = 0
) -> Tensor:
    positions_SB = torch.arange(first_position, first_position + len(x_SBH)).unsqueeze(1)
    stream = DropoutStream(seed, first_sample)
    return drop_hidden(x_SBH, 0.5, stream, site=site, positions_SB=positions_SB, kernels=context_of().kernels)


def test_samples_and_positions_are_dropped_alike_in_whatever_parts_they_come() -> None:
    whole = hidden()
    assert torch.equal(hidden(ONES[:, 1:3], first_sample=1), whole[:, 1:3])
    assert torch.equal(hidden(ONES[5:7], first_position=5), whole[5:7])
    assert torch.equal(hidden(torch.ones(S, B, 2 * H))[..., :H], whole)


def test_another_seed_site_sample_or_position_is_dropped_otherwise() -> None:
    assert step_seed(1, 2) not in (step_seed(1, 3), step_seed(2, 2), step_seed(2, 1))
    x = torch.ones(64, 8, 64)
    changes = [{}, {"seed": 8}, {"site": "layers.1.mlp"}, {"site": "embedding"}, {"first_sample": 8},
               {"first_position": 64}, {"first_sample": 1}, {"first_position": 1}]  # fmt: skip
    for one, other in combinations([hidden(x, **change) > 0 for change in changes], 2):
        agreement = float((one == other).float().mean())
        assert abs(agreement - 0.5) < 4.9 * 0.5 / x.numel() ** 0.5, "unrelated masks agree in half of the places"


def test_without_a_stream_or_a_probability_nothing_is_dropped() -> None:
    given = {"site": "p", "kernels": context_of().kernels}
    positions_SB = torch.arange(S).unsqueeze(1)
    assert drop_hidden(ONES, 0.5, None, positions_SB=positions_SB, **given) is ONES
    assert drop_hidden(ONES, 0.0, DropoutStream(1, 0), positions_SB=positions_SB, **given) is ONES
    assert drop_samples(ONES, 0.5, None, **given) is ONES
    assert drop_samples(ONES, 0.0, DropoutStream(1, 0), **given) is ONES


# --- Attention --------------------------------------------------------------------------------------------------------


def dropout_of(*, first_head: int = 0, first_sample: int = 0, probability: float = 0.3) -> ProbabilityDropout:
    return ProbabilityDropout(probability, DropoutStream(7, first_sample), "layers.0.attention.core", first_head, 0)


MASKINGS = {
    "causal": Masking(None, True),
    "all to all": Masking(None, False),
    "padding": Masking((torch.arange(S) < torch.tensor([[8], [5], [1], [3]])).unsqueeze(1), False),
    "documents": Masking(((torch.arange(S) >= 3).unsqueeze(1) == (torch.arange(S) >= 3)).tril().expand(B, S, S), False),
}


@pytest.mark.parametrize("groups", [N, 2, 1])
@pytest.mark.parametrize("name", MASKINGS)
def test_the_core_with_dropout_of_almost_nothing_is_the_fused_one(name: str, groups: int) -> None:
    """A probability that rounds to no dropout leaves torch's own core as the reference, gradients included."""
    q, k, v = (numbered(B, heads, S, D, seed=n, dtype=torch.float32) for n, heads in enumerate((N, groups, groups)))
    found = []
    for dropout in (None, dropout_of(probability=1e-6)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*leaves, MASKINGS[name], dropout)
        y.square().sum().backward()
        found.append([y.detach(), *[x.grad for x in leaves]])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=5e-6)


def test_dropped_probabilities_are_those_of_their_sample_head_query_and_key() -> None:
    """Values that are one-hot in the key show each row of probabilities."""
    q = torch.zeros(B, N, S, S)
    values = torch.eye(S).expand(B, N, S, S)
    rows = attend(q, q, values, Masking(None, False), dropout_of())
    kept = rows > 0
    torch.testing.assert_close(rows[kept], torch.full_like(rows[kept], 1 / S / 0.7), rtol=1e-4, atol=0)
    assert 0.6 < float(kept.float().mean()) < 0.8
    for first_sample, first_head in ((0, 0), (1, 1), (2, 2)):
        q2 = torch.zeros(2, 2, S, S)
        given = dropout_of(first_head=first_head, first_sample=first_sample)
        part = attend(q2, q2, values[:2, :2], Masking(None, False), given)
        assert torch.equal(part, rows[first_sample : first_sample + 2, first_head : first_head + 2])
    first = attend(q[:, :, :1], q, values, Masking(None, False), dropout_of())
    assert torch.equal(first, rows[:, :, :1]), "the first query alone drops what it drops among all"
    assert len({tuple(row.tolist()) for row in kept.flatten(0, 2)}) > 0.6 * B * N * S, "rows share their masks"


def test_a_query_without_any_key_gives_numbers() -> None:
    q = numbered(1, 1, 2, D, seed=1, dtype=torch.float32)
    assert torch.isfinite(attend(q, q, q, Masking(torch.zeros(1, 1, 2, dtype=torch.bool), False), dropout_of())).all()


def test_narrow_inputs_are_computed_in_fp32_and_come_back_narrow() -> None:
    q = numbered(B, N, S, D, seed=1, dtype=torch.bfloat16)
    narrow = attend(q, q, q, MASKINGS["causal"], dropout_of())
    wide = attend(q.float(), q.float(), q.float(), MASKINGS["causal"], dropout_of())
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.bfloat16())


def test_only_kernels_that_draw_their_own_masks_are_not_by_place() -> None:
    assert draws_by_place("cpu") and not draws_by_place("cuda")


def attention(layer: int = 0, *, recompute_core: bool = False) -> SelfAttention:
    context = context_of()
    module = SelfAttention(DROPPING, context, layer=layer, recompute_core=recompute_core)
    fill(module, context.tp, dtype=torch.float32)
    return module


def run_attention(module: SelfAttention, stream: DropoutStream | None) -> tuple[Tensor, Tensor, Tensor]:
    x = numbered(S, B, H, seed=1, dtype=torch.float32).requires_grad_()
    y = module(x, LayerInputs(dropout=stream))
    y.square().sum().backward()
    grad, module.qkv.weight.grad = module.qkv.weight.grad, None
    return y.detach(), x.grad, grad


def test_attention_dropout_is_a_function_of_stream_and_layer_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = run_attention(attention(), DropoutStream(7, 0))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first, run_attention(attention(), DropoutStream(7, 0))))
    for other in (DropoutStream(8, 0), DropoutStream(7, B), None):
        assert not torch.equal(first[0], run_attention(attention(), other)[0])
    assert not torch.equal(first[0], run_attention(attention(layer=1), DropoutStream(7, 0))[0])


def test_recomputed_attention_draws_the_same_mask_again() -> None:
    stream = DropoutStream(7, 0)
    plain, recomputed = run_attention(attention(), stream), run_attention(attention(recompute_core=True), stream)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))


def test_attention_dropout_keeps_the_mean_of_the_values() -> None:
    """With values of one, each output is the sum of the kept probabilities over 1 - p: one on average."""
    q, ones = torch.zeros(16, 4, 32, 4), torch.ones(16, 4, 32, 4)
    means = torch.stack(
        [attend(q, q, ones, Masking(None, True), dropout_of(first_sample=16 * n))[:, :, 8:].mean() for n in range(20)]
    )
    # 16 x 4 x 24 rows of at least 9 equal probabilities a draw: a standard error under 0.3 / sqrt(1536 x 20 x 9) x 1.6.
    assert abs(float(means.mean()) - 1.0) < 0.01
    assert float(means.std()) > 0, "nothing was dropped"


# --- Two tensor-parallel ranks ----------------------------------------------------------------------------------------


def dropped_of_ones(block: Block, x: Tensor, inputs: LayerInputs) -> Tensor:
    """What a block's second half would drop of ones."""
    dropping = block._dropping(x, inputs, "mlp")
    assert dropping is not None, "the block drops"
    return block.context.kernels.dropout(torch.ones_like(x), dropping.keys, dropping.probability)


def _block_and_mask(axis_size: int, sequence_parallel: bool) -> tuple[Tensor, Tensor, LayerContext]:
    context = context_of(axis_size, sequence_parallel)
    block = Block(DROPPING, context, layer=0)
    fill(block, context.tp, dtype=torch.float32)
    inputs, whole = LayerInputs(dropout=DropoutStream(3, 0)), numbered(S, B, H, seed=2, dtype=torch.float32)
    x = context.local_sequence(whole)
    return block(x, inputs).detach(), dropped_of_ones(block, x, inputs), context


def _on_two_ranks(rank: int, world_size: int, sequence_parallel: bool) -> list[Tensor]:
    y, mask, context = _block_and_mask(world_size, sequence_parallel)
    return gather_values((y, mask), context.tp)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_drop_what_one_process_drops(pool: Pool, sequence_parallel: bool) -> None:
    whole, whole_mask, _ = _block_and_mask(1, False)
    for everyone in pool.run(2, _on_two_ranks, sequence_parallel):
        if sequence_parallel:
            y, mask = (torch.cat(parts) for parts in zip(*everyone, strict=True))
            found = [(y, mask)]
        else:
            found = everyone
        for y, mask in found:
            assert torch.equal(mask, whole_mask)
            torch.testing.assert_close(y, whole)
