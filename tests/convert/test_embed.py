"""Vectors of texts equal those of transformers' encoder pooled by hand, alone, in batches and at any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron3d.comm.layout import Layout
from megatron3d.convert.hf import read_model, save_model
from megatron3d.inference.embed import POOLINGS, EmbedOptions, batches_by_length
from tests.convert.ours import vectors
from tests.convert.theirs import POSITIONS, VOCAB, build, saved
from tests.dist.pool import Pool

TOLERANCE = 1e-5


def texts() -> list[list[int]]:
    """Token ids of texts of many lengths, in no order."""
    generator = torch.Generator().manual_seed(5)
    lengths = (3, 24, 9, 9, 1, 17, 12, 2)
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def expected(theirs: nn.Module, pooling: str) -> Tensor:
    """transformers' vector of each text alone, so without any padding."""
    rows = []
    for ids in texts():
        with torch.no_grad():
            outputs = theirs(torch.tensor([ids]))
        hidden_SH = outputs.last_hidden_state[0]
        rows.append({"mean": hidden_SH.mean(0), "cls": hidden_SH[0], "pooler": outputs.pooler_output[0]}[pooling])
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["bert-bare", "megatron-bert"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_equal_those_of_transformers_at_any_layout(pool: Pool, tmp_path: Path, name: str, pooling: str) -> None:
    theirs = build(name)
    checkpoint = save_model(read_model(saved(theirs, tmp_path / "theirs")), tmp_path / "ours")
    wanted = expected(theirs if name == "bert-bare" else theirs.bert, pooling)
    options = EmbedOptions(pooling, batch_tokens=2 * POSITIONS)
    found = [vectors(0, 1, checkpoint, Layout(), texts(), options)]
    found += pool.run(4, vectors, checkpoint, Layout(tp=2, pp=2), texts(), options)
    found += pool.run(4, vectors, checkpoint, Layout(pp=2, dp=2), texts(), options)
    for one in found:
        assert one.shape == wanted.shape
        assert float((one - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


def test_normalized_vectors_have_length_one_and_keep_their_direction(tmp_path: Path) -> None:
    checkpoint = save_model(read_model(saved(build("bert-bare"), tmp_path / "theirs")), tmp_path / "ours")
    plain = vectors(0, 1, checkpoint, Layout(), texts(), EmbedOptions())
    unit = vectors(0, 1, checkpoint, Layout(), texts(), EmbedOptions(normalize=True))
    assert torch.allclose(unit.norm(dim=1), torch.ones(len(unit)), atol=1e-6)
    assert torch.allclose(unit * plain.norm(dim=1, keepdim=True), plain, atol=1e-5)


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 200))
def test_batches_hold_every_text_once_and_stay_within_their_size(lengths: list[int], batch_tokens: int) -> None:
    batches = batches_by_length(lengths, batch_tokens)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    sizes = [[lengths[number] for number in batch] for batch in batches]
    assert all(len(batch) == 1 or max(batch) * len(batch) <= batch_tokens for batch in sizes)
    assert [length for batch in sizes for length in batch] == sorted(lengths, reverse=True)
