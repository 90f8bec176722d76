"""Dropped tokens: which positions a layer keeps, and that it computes with those alone what a plain layer would."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron3d_kernels.rectangles import Plan
from torch import Tensor

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.random_ltd import NUM_STRATA
from megatron3d.config.sections.model import ModelConfig
from megatron3d.nn.block import Block
from megatron3d.nn.documents import document_rectangles
from megatron3d.nn.inputs import LayerInputs
from megatron3d.nn.positions import rotary_table
from megatron3d.nn.token_dropping import (
    StratifiedRouter,
    TokenDropping,
    on_kept_positions,
    step_seed,
)
from megatron3d.params.grads import GradSink
from megatron3d.tensor.context import LayerContext
from tests.dist.pool import Pool
from tests.nn import dense
from tests.nn.dense import model_config
from tests.tensor.full import assert_gradients_equal, fill, numbered

CPU = torch.device("cpu")
L, B, R = 40, 2, 16  # 16 does not divide the length: strata of two and three positions
RTOL, ATOL = 1e-6, 1e-6  # as in test_block: the rotary table is fp32
LAYER = 1


def kept_by(seed: int, step: int, layer: int, samples: range, length: int, most: int) -> Tensor:
    found = StratifiedRouter(step_seed(seed, step), most).kept(layer, samples, length, CPU)
    return torch.arange(length).expand(len(samples), length) if found is None else found


@given(
    length=st.integers(16, 200),
    sixteenths=st.integers(1, 13),
    first=st.integers(0, 2**40),
    step=st.integers(0, 10**6),
    layer=st.integers(0, 100),
)
def test_each_stratum_and_so_each_shard_keeps_equally_many(
    length: int, sixteenths: int, first: int, step: int, layer: int
) -> None:
    samples, most = range(first, first + 3), NUM_STRATA * sixteenths
    found = kept_by(7, step, layer, samples, length, most)
    count = StratifiedRouter(0, most).num_kept(layer, length)
    assert found.shape == (3, count) and found.min() >= 0 and found.max() < length
    assert (found.diff(dim=1) > 0).all()
    assert count == min(most, length if most >= length else length // 16 * 16)
    for shards in (2, 4, 8, 16):
        if length % shards == 0:
            in_shards = torch.stack([(found // (length // shards) == one).sum(1) for one in range(shards)])
            assert (in_shards == count // shards).all()


def test_a_choice_depends_on_run_step_layer_and_sample_and_on_nothing_else() -> None:
    whole = kept_by(7, 3, 1, range(4, 8), L, R)
    assert torch.equal(whole, kept_by(7, 3, 1, range(4, 8), L, R))
    for sample in range(4, 8):  # whoever else is in the micro-batch
        assert torch.equal(kept_by(7, 3, 1, range(sample, sample + 1), L, R)[0], whole[sample - 4])
    assert len({tuple(row.tolist()) for row in whole}) == 4
    for other in (kept_by(8, 3, 1, range(4, 8), L, R), kept_by(7, 4, 1, range(4, 8), L, R)):
        assert not torch.equal(other, whole)
    assert not torch.equal(kept_by(7, 3, 2, range(4, 8), L, R), whole)


def test_every_position_of_a_stratum_is_kept_equally_often() -> None:
    """Of 4,000 draws each position of a stratum of 4 is in half: 4 standard deviations are 126."""
    found = kept_by(1, 0, 0, range(4000), 64, 32)
    times = torch.bincount(found.flatten(), minlength=64)
    assert (times - 2000).abs().max() < 4 * (4000 * 0.25) ** 0.5
    pairs = torch.zeros(4000, 64, dtype=torch.bool).scatter_(1, found, True)[:, :4]
    together = [(pairs[:, i] & pairs[:, j]).sum().item() for i in range(4) for j in range(i)]
    assert all(abs(count - 4000 / 6) < 4 * (4000 / 6 * 5 / 6) ** 0.5 for count in together)


def test_layers_that_are_not_named_and_samples_that_are_not_longer_keep_all() -> None:
    dropping = TokenDropping(StratifiedRouter(5, 32), frozenset({2}), first_sample=0)
    assert dropping.kept(1, 2, 64, CPU) is None and dropping.kept(2, 2, 32, CPU) is None
    found = dropping.kept(2, 2, 64, CPU)
    assert found is not None and found.shape == (2, 32)


@dataclass(frozen=True)
class Case:
    """A model, and what its attention gets of the positions."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    mask_BST: Tensor | None = None
    positions_BS: Tensor | None = None
    rectangles: Plan | None = None  # what the layer gets instead of the mask

    @property
    def config(self) -> ModelConfig:
        return model_config(seq_length=L, max_position_embeddings=L, **self.changes)


DOCUMENTS_BL = (torch.arange(L) >= torch.tensor([[11], [25]])).long()  # two in each sample, cut at different places


def documents() -> Tensor:
    """Causal attention within each document, as a mask."""
    same_BLL = DOCUMENTS_BL.unsqueeze(2) == DOCUMENTS_BL.unsqueeze(1)
    return same_BLL & torch.ones(L, L, dtype=torch.bool).tril()


def within_documents() -> Tensor:
    positions = torch.arange(L)
    cuts = torch.tensor([[11], [25]])
    return torch.where(positions >= cuts, positions - cuts, positions)


ROPE = {"position_embedding_type": "rope"}
PADDING = (torch.arange(L) < torch.tensor([[L], [L - 9]])).unsqueeze(1)
CASES = [
    Case("gpt2"),
    Case("llama", {**ROPE, "normalization": "RMSNorm", "activation": "swiglu", "num_query_groups": 2}),
    Case("documents", ROPE, documents(), within_documents(), document_rectangles(DOCUMENTS_BL)),
    Case("bert", {"architecture": "bert"}, PADDING),
    Case("bert without padding", {"architecture": "bert"}, torch.ones(B, 1, L, dtype=torch.bool)),
]


def one_by_one(x_SBH: Tensor, leaves: dict[str, Tensor], case: Case, kept_BR: Tensor) -> Tensor:
    """Each sample by itself: the dense block on its kept rows, which then take the places of those rows."""
    samples = []
    for sample in range(B):
        rows = kept_BR[sample]
        positions_S = torch.arange(L) if case.positions_BS is None else case.positions_BS[sample]
        mask_ST = torch.ones(L, L, dtype=torch.bool).tril()
        if case.mask_BST is not None:
            mask_ST = case.mask_BST[sample].expand(L, L)
        y_R1H = dense.block(
            x_SBH[rows, sample : sample + 1],
            leaves,
            case.config,
            mask_BST=mask_ST[rows][:, rows].unsqueeze(0),
            position_ids_BS=positions_S[rows].unsqueeze(0),
        )
        y_by_token = dict(zip(rows.tolist(), y_R1H, strict=True))
        samples.append(torch.stack([y_by_token.get(s, x_SBH[s, sample : sample + 1]) for s in range(L)]))
    return torch.cat(samples, dim=1)


def check_layer(case: Case, context: LayerContext) -> None:
    """Output, input gradient and all weight gradients of a layer that drops tokens, on this rank."""
    config, dropping = case.config, TokenDropping(StratifiedRouter(3, R), frozenset({LAYER}), first_sample=6)
    block = Block(config, context, layer=LAYER)
    leaves = {name: whole.clone().requires_grad_() for name, whole in fill(block, context.tp, scale=0.4).items()}
    x, weight_of_loss = numbered(L, B, 16, seed=1).requires_grad_(), numbered(L, B, 16, seed=2)
    kept_BR = StratifiedRouter(3, R).kept(LAYER, range(6, 6 + B), L, CPU)
    assert kept_BR is not None and not torch.equal(kept_BR[0], kept_BR[1])
    y = one_by_one(x, leaves, case, kept_BR)
    (weight_of_loss * y).sum().backward()
    share = L // context.tp.size if context.sequence_parallel else L
    first = share * context.tp.rank if context.sequence_parallel else 0
    own = slice(first, first + share)
    own_x = x.detach()[own].clone().requires_grad_()
    is_rope = config.position_embedding_type == "rope"
    rotary = rotary_table(config, L, case.positions_BS, device=CPU) if is_rope else None
    mask_BST = case.mask_BST if case.rectangles is None else None
    inputs = LayerInputs(rotary, mask_BST, dropping=dropping, rectangles=case.rectangles)
    own_y = on_kept_positions(block, LAYER, context)(own_x, inputs)
    torch.testing.assert_close(own_y, y.detach()[own], rtol=RTOL, atol=ATOL)
    (weight_of_loss[own] * own_y).sum().backward()
    torch.testing.assert_close(own_x.grad, x.grad[own], rtol=RTOL, atol=ATOL)
    assert_gradients_equal(block, context.tp, leaves, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layer_gives_what_each_sample_would_get_from_its_kept_rows_alone(case: Case) -> None:
    check_layer(case, LayerContext(make_mesh(Layout()).tp, False, GradSink()))


def _check_layers(rank: int, world_size: int) -> None:
    axis = make_mesh(Layout(tp=world_size)).tp
    for sequence_parallel, cases in ((False, CASES[:1]), (True, CASES[1:4])):
        for case in cases:
            check_layer(case, LayerContext(axis, sequence_parallel, GradSink()))


def test_a_layer_on_two_ranks_gives_the_same(pool: Pool) -> None:
    pool.run(2, _check_layers)
