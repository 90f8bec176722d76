"""Packed documents: which squares of the scores they are, and that dropout in them is that of the masked whole."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron3d_kernels.rectangles import Plan
from torch import Tensor

from megatron3d.nn.attention_core import Masking, ProbabilityDropout, attend
from megatron3d.nn.documents import document_rectangles, kept_rectangles
from megatron3d.nn.dropout import DropoutStream

LENGTHS = [[1, 4, 3], [8], [2, 2, 4]]


def documents_of(lengths: list[list[int]]) -> Tensor:
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return torch.stack(rows)


def mask_of(documents_BS: Tensor) -> Tensor:
    same_BSS = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    return same_BSS.tril()


def scores_of(plan: Plan, length: int) -> Tensor:
    """Which scores stand in the rectangles, found one by one."""
    seen = torch.zeros(len(plan), length, length, dtype=torch.bool)
    for sample, rectangles in enumerate(plan):
        for one in rectangles:
            for row, query in enumerate(one.queries):
                for key in one.keys[: row + 1] if one.is_causal else one.keys:
                    assert not seen[sample, query, key]
                    seen[sample, query, key] = True
    return seen


@st.composite
def samples(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Document numbers of samples, and some positions of each."""
    length, num_samples = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    starts = st.lists(st.booleans(), min_size=length, max_size=length)
    documents_BS = torch.tensor([draw(starts) for _ in range(num_samples)]).cumsum(1)
    num_kept = draw(st.integers(1, length))
    kept = [sorted(draw(st.permutations(range(length)))[:num_kept]) for _ in range(num_samples)]
    return documents_BS, torch.tensor(kept)


@given(documents_and_kept=samples())
@settings(max_examples=25, deadline=None)
def test_squares_hold_the_scores_of_the_mask_among_all_and_among_kept_positions(
    documents_and_kept: tuple[Tensor, Tensor],
) -> None:
    documents_BS, kept_BR = documents_and_kept
    plan, mask_BSS = document_rectangles(documents_BS), mask_of(documents_BS)
    assert torch.equal(scores_of(plan, documents_BS.shape[1]), mask_BSS)
    of_kept = torch.stack([mask[kept][:, kept] for mask, kept in zip(mask_BSS, kept_BR)])
    assert torch.equal(scores_of(kept_rectangles(plan, kept_BR), kept_BR.shape[1]), of_kept)


def test_dropout_of_probabilities_in_documents_is_that_of_the_masked_whole() -> None:
    """To rounding: the same probabilities are dropped, and sums have no zeros in between."""
    documents_BS = documents_of(LENGTHS)
    dropout = ProbabilityDropout(0.4, DropoutStream(7, first_sample=5), "layers.1", first_head=2, shard=1)
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 8, 4, requires_grad=True) for heads in (4, 2, 2))
    grad = torch.randn(3, 4, 8, 4)
    found = []
    for masking in (Masking(mask_of(documents_BS), False), Masking(None, True, document_rectangles(documents_BS))):
        y = attend(q, k, v, masking, dropout)
        found.append((y, *torch.autograd.grad(y, (q, k, v), grad)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    plain = attend(q, k, v, Masking(None, True, document_rectangles(documents_BS)))
    assert not torch.allclose(plain, found[0][0], atol=0.1)
