"""Global batches: the same samples in the same order for every layout, read ahead or not; bad ids are found."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.config.sections.data import DataConfig
from megatron3d.data.batch import GPTBatch
from megatron3d.data.build import build_gpt_data, document_rules
from megatron3d.data.gpt import GPTReader, GPTSamples
from megatron3d.data.loader import GlobalBatches
from megatron3d.data.mock import MockSamples
from megatron3d.errors import DataError
from tests.data.corpora import write_documents

MOCK = MockSamples("train", seq_length=6, vocab_size=100, eod_token=0, seed=3)


def batches(
    stream: MockSamples | GPTSamples = MOCK, workers: int = 0, vocab_size: int = 100, **options: bool
) -> GlobalBatches[GPTBatch]:
    data = DataConfig(mock_data=True, **options)
    bound = vocab_size if data.dataloader_check_ids else None
    return GlobalBatches(GPTReader(stream, document_rules(data, 0), bound), num_workers=workers)


@settings(max_examples=40, deadline=None)
@given(
    consumed=st.integers(0, 10**9),
    dp_size=st.integers(1, 4),
    micro_batch=st.integers(1, 3),
    num_micro=st.integers(1, 3),
)
def test_global_batch_is_the_same_list_of_samples_at_every_layout(
    consumed: int, dp_size: int, micro_batch: int, num_micro: int
) -> None:
    size = dp_size * micro_batch * num_micro
    reader = batches()
    parts = [reader.read(consumed, size, rank, dp_size).split(micro_batch) for rank in range(dp_size)]
    rows = torch.cat([batch.tokens_BS for part in parts for batch in part])
    assert [len(part) for part in parts] == [num_micro] * dp_size
    assert rows.tolist() == [MOCK.sample(consumed + row)[:-1].tolist() for row in range(size)]


def test_reading_ahead_changes_nothing_also_over_jumps_and_ramps() -> None:
    plan = [(0, 4), (4, 4), (8, 4), (12, 8), (20, 8), (4, 4), (8, 2), (10, 2), (10, 2)]
    with batches(workers=3) as ahead:
        for consumed, size in plan:
            ours, plain = ahead.read(consumed, size, 1, 2), batches().read(consumed, size, 1, 2)
            assert torch.equal(ours.tokens_BS, plain.tokens_BS) and torch.equal(ours.labels_BS, plain.labels_BS)


def test_next_batch_is_being_read_while_this_one_is_used() -> None:
    class Watched(MockSamples):
        """Says when sample 2 was asked for."""

        asked = threading.Event()

        def sample(self, number: int) -> np.ndarray:
            if number == 2:
                self.asked.set()
            return super().sample(number)

    with batches(Watched("train", seq_length=6, vocab_size=100, eod_token=0, seed=3), workers=1) as reader:
        reader.read(0, 2, 0, 1)
        assert Watched.asked.wait(timeout=10)


def test_closing_leaves_no_thread() -> None:
    before = threading.active_count()
    reader = batches(workers=4)
    reader.read(0, 2, 0, 1)
    assert threading.active_count() > before
    reader.close()
    assert threading.active_count() == before


def test_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="6 does not divide among dp=4"):
        batches().read(0, 6, 0, 4)


def test_document_rules_of_the_options_are_applied() -> None:
    batch = batches(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True).read(0, 64, 0, 1)
    assert batch.position_ids_BS is not None and batch.document_ids_BS is not None
    assert torch.equal(batch.loss_mask_BS == 0, batch.tokens_BS == 0)
    assert (batch.tokens_BS == 0).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_id_outside_the_vocabulary_is_named_with_file_document_and_offset(tmp_path: Path, workers: int) -> None:
    dataset = write_documents(tmp_path / "d", [[1, 2, 3], [4, 99, 6, 7]])
    stream = GPTSamples(dataset, range(2), seq_length=6, seed=0)
    with batches(stream, workers, vocab_size=99) as reader, pytest.raises(DataError) as caught:
        reader.read(0, 1, 0, 1)
    assert str(caught.value) == (
        f"{tmp_path / 'd.bin'}, document 1, sequence 1, token 1: token id 99 is outside the vocabulary of 99; use the "
        f"tokenizer and vocabulary the data was preprocessed with."
    )


def test_negative_id_is_found(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "d", [[1, 2, -3, 4]], np.int32)
    with pytest.raises(DataError, match="token 2: token id -3 is outside"):
        batches(GPTSamples(dataset, range(1), seq_length=3, seed=0)).read(0, 1, 0, 1)


def test_ids_are_not_checked_when_told_not_to(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "d", [[1, 2, 300, 4]])
    stream = GPTSamples(dataset, range(1), seq_length=3, seed=0)
    batch = batches(stream, vocab_size=5, dataloader_check_ids=False).read(0, 1, 0, 1)
    assert batch.tokens_BS.tolist() == [[1, 2, 300]]


def test_mock_data_follows_its_cycle_nine_times_in_ten() -> None:
    """A bigram table counted on training samples must predict validation samples: the chain is learnable."""
    data = build_gpt_data(DataConfig(mock_data=True, seed=7), seq_length=200, vocab_size=40, eod_token=None)
    counts = np.zeros((40, 40))
    for number in range(50):
        sample = data.train.sample(number)
        np.add.at(counts, (sample[:-1], sample[1:]), 1)
    pairs = np.concatenate([np.stack([s[:-1], s[1:]]) for s in (data.valid.sample(n) for n in range(50))], axis=1)
    hits = (counts.argmax(axis=1)[pairs[0]] == pairs[1]).mean()
    assert hits == pytest.approx(0.9 + 0.1 / 40, abs=0.01)
    assert data.train.sample(0).tolist() != data.valid.sample(0).tolist()
