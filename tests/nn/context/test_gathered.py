"""Attention over gathered keys against dense attention of whole samples, and what it communicates."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.sections.parallel import CONTEXT_CUTS
from megatron3d.inference.prefill import chunks, plan_of_chunk
from megatron3d.nn.context.cut import ContextCut
from megatron3d.nn.context.gathered import AllGatherAttention
from megatron3d.nn.context.shards import shards_of
from megatron3d.nn.inputs import LayerInputs
from megatron3d.tensor.context import KeyExchange, unsharded_context
from tests.dist.pool import Pool

B, N, G, S, D = 2, 4, 2, 48, 8
DOCUMENTS = torch.stack([torch.arange(S) // 7, (torch.arange(S) > 29).long()])
CASES = list(itertools.product(CONTEXT_CUTS, (False, True), (False, True)))  # cut, packed and causal, gathered again


def _dense(packed: bool) -> list[Tensor]:
    """Queries, keys, values, gradient, output and gradients of whole samples: causal within documents, or, of samples
    that are not packed, in both directions."""
    draw = torch.Generator().manual_seed(3)
    q, k, v, grad = (torch.randn(B, heads, S, D, generator=draw) for heads in (N, G, G, N))
    mask = (DOCUMENTS.unsqueeze(2) == DOCUMENTS.unsqueeze(1)).tril().unsqueeze(1) if packed else None
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    return [q, k, v, grad, y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def _errors(rank: int, world_size: int) -> list[tuple[list[float], dict[tuple[str, str], tuple[int, int]]]]:
    """Of each case the largest errors of output and gradients, relative to the largest value, and what was counted."""
    mesh = make_mesh(Layout(cp=world_size))
    found = []
    for cut, packed, again in CASES:
        documents_BS = DOCUMENTS if packed else None
        shards = shards_of(ContextCut(cut, S, world_size), rank, documents_BS, is_causal=packed)
        index = shards.positions_BL.expand(B, -1)[:, None, :, None]
        q, k, v, grad, *expected = (x.gather(2, index.expand(-1, x.shape[1], -1, D)) for x in _dense(packed))
        context = replace(unsharded_context(), cp=mesh.cp, exchange=KeyExchange(gathers_again=again))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        mesh.meter.reset()
        y = AllGatherAttention(context)(leaves[0], leaves[1], leaves[2], LayerInputs(shards=shards))
        results = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
        errors = [float((x - e).abs().max() / e.abs().max()) for x, e in zip(results, expected, strict=True)]
        found.append((errors, mesh.meter.read()))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_over_gathered_keys_are_those_of_one_process_by_one_collective_each_way(
    pool: Pool, world_size: int
) -> None:
    keys_and_values = 2 * B * S * G * D * 4
    for of_rank in pool.run(world_size, _errors):
        for case, (errors, counted) in zip(CASES, of_rank, strict=True):
            assert max(errors) < 1e-6, f"{case}: {errors}"
            gathers = 2 if case[2] else 1
            assert counted == {
                ("cp", "all_gather"): (gathers, gathers * keys_and_values),
                ("cp", "reduce_scatter"): (1, keys_and_values),
            }, case


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_prompt_is_read_in_chunks_of_which_the_last_place_is_on_every_rank(num_ranks: int) -> None:
    for stop in range(1, 60):
        found = list(chunks(3, 3 + stop, at_once=5, num_ranks=num_ranks))
        assert [place for places, _ in found for place in places] == list(range(3, 3 + stop))
        assert not found[-1][1], "the last one is not cut"
        assert all(len(places) % (2 * num_ranks) == 0 for places, is_cut in found if is_cut)
        assert all(len(places) <= (5 * num_ranks if is_cut else 5) for places, is_cut in found)


def test_places_of_a_chunk_attend_to_all_tokens_so_far_and_padding_to_itself() -> None:
    padding = [0, 10, 14]
    for rank in range(2):
        shards = shards_of(ContextCut("zigzag", 8, 2), rank, is_causal=True)
        plan = plan_of_chunk(shards, range(8, 16), padding)
        for first_token, rectangles in zip(padding, plan, strict=True):
            seen = torch.zeros(4, 16, dtype=torch.bool)
            for one in rectangles:
                part = torch.ones(len(one.queries), len(one.keys), dtype=torch.bool)
                seen[one.queries.start : one.queries.stop, one.keys.start : one.keys.stop] |= (
                    part.tril() if one.is_causal else part
                )
            places = shards.positions_BL[0] + 8
            expected = torch.arange(16) <= places.unsqueeze(1)
            is_token = places >= first_token
            assert torch.equal(seen[is_token], (expected & (torch.arange(16) >= first_token))[is_token])
            assert (seen[~is_token].sum(1) > 0).all(), "no row is without a key"
