"""GPT samples: every token of an epoch once, a pure function of the number, and Megatron's document rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron3d.data.gpt import DocumentRules, GPTSamples, collate
from megatron3d.errors import DataError
from tests.data.corpora import counting_documents, write_documents

lengths_and_seq_length = st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 8)).filter(
    lambda pair: sum(pair[0]) > pair[1]
)


def samples_of(prefix: Path, lengths: list[int], seq_length: int, seed: int) -> GPTSamples:
    dataset = write_documents(prefix, counting_documents(lengths))
    return GPTSamples(dataset, range(len(lengths)), seq_length=seq_length, seed=seed)


@settings(max_examples=60, deadline=None)
@given(shape=lengths_and_seq_length, seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
def test_every_token_of_an_epoch_is_an_input_once(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[list[int], int], seed: int, epoch: int
) -> None:
    """The documents count 0, 1, 2, ..., so the inputs of an epoch must be n*S numbers in a row, each once."""
    lengths, seq_length = shape
    samples = samples_of(tmp_path_factory.mktemp("d") / "d", lengths, seq_length, seed)
    per_epoch = samples.num_samples_per_epoch
    assert per_epoch == (sum(lengths) - 1) // seq_length
    read = [samples.sample(epoch * per_epoch + index) for index in range(per_epoch)]
    for sample in read:
        assert np.array_equal(np.diff(sample), np.ones(seq_length))
    inputs = sorted(token for sample in read for token in sample[:-1].tolist())
    assert inputs == list(range(inputs[0], inputs[0] + per_epoch * seq_length))
    assert inputs[0] >= 0 and inputs[-1] + 1 < sum(lengths)


def test_sample_is_a_function_of_its_number_alone(tmp_path: Path) -> None:
    samples = samples_of(tmp_path / "d", [7] * 20, 4, 1)
    again = GPTSamples(samples.dataset, range(20), seq_length=4, seed=1)
    numbers = np.random.default_rng(0).permutation(200)
    by_number = {int(number): samples.sample(int(number)).tolist() for number in numbers}
    assert all(again.sample(number).tolist() == by_number[number] for number in range(200))


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    samples = samples_of(tmp_path / "d", [101], 5, 1)
    other = GPTSamples(samples.dataset, range(1), seq_length=5, seed=2)
    per_epoch = samples.num_samples_per_epoch
    first, second = ([samples.sample(e * per_epoch + i)[0] for i in range(per_epoch)] for e in range(2))
    assert sorted(first) == sorted(second) and first != second
    assert first != [other.sample(i)[0] for i in range(per_epoch)]


def test_left_over_tokens_change_with_the_epoch(tmp_path: Path) -> None:
    """17 tokens make one sample of 10; over epochs it must begin at each of the 7 possible places."""
    samples = samples_of(tmp_path / "d", [17], 10, 3)
    assert {int(samples.sample(epoch)[0]) for epoch in range(200)} == set(range(7))


def test_only_the_documents_of_the_split_are_read(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "d", counting_documents([10, 10, 10]))
    samples = GPTSamples(dataset, range(1, 2), seq_length=3, seed=0)
    read = {int(token) for number in range(60) for token in samples.sample(number)}
    assert read == set(range(10, 20))


def test_location_names_the_very_token(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "d", counting_documents([3, 5, 0, 4, 6]))
    samples = GPTSamples(dataset, range(1, 5), seq_length=4, seed=0)
    for number in range(6):
        for position, token in enumerate(samples.sample(number)):
            document = next(k for k in range(5) if token in dataset.document(k))
            offset = int(token) - int(dataset.document(document)[0])
            assert samples.locate(number, position) == (
                f"{tmp_path / 'd.bin'}, document {document}, sequence {document}, token {offset}"
            )


def test_corpus_too_short_for_one_sample_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        samples_of(tmp_path / "d", [3, 5], 8, 0)
    assert str(caught.value) == (
        f"{tmp_path / 'd'}: documents 0 to 2 hold 8 tokens, but one sample of --seq-length 8 needs 9; lower "
        f"--seq-length, give this split more of the documents with --split, or add data."
    )


def test_negative_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="sample -1"):
        samples_of(tmp_path / "d", [9], 4, 0).sample(-1)


def test_labels_are_the_next_tokens() -> None:
    batch = collate(np.array([[5, 6, 7, 8], [1, 2, 3, 4]]), DocumentRules(None))
    assert batch.tokens_BS.tolist() == [[5, 6, 7], [1, 2, 3]]
    assert batch.labels_BS.tolist() == [[6, 7, 8], [2, 3, 4]]
    assert batch.loss_mask_BS.tolist() == [[1.0] * 3] * 2
    assert batch.position_ids_BS is None and batch.document_ids_BS is None
    assert (batch.tokens_BS.dtype, batch.loss_mask_BS.dtype) == (torch.int64, torch.float32)


def test_document_rules_by_hand() -> None:
    rules = DocumentRules(0, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    batch = collate(np.array([[4, 0, 5, 6, 0, 0, 7, 8]]), rules)
    assert batch.position_ids_BS.tolist() == [[0, 1, 0, 1, 2, 0, 0]]
    assert batch.document_ids_BS.tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    assert batch.loss_mask_BS.tolist() == [[1, 0, 1, 1, 0, 0, 1]]
    assert batch.loss_count() == 4


@pytest.mark.parametrize("switches", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_document_rules_are_those_of_megatron_core(switches: tuple[int, int, int]) -> None:
    theirs = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="needs megatron-core")
    reset_positions, reset_attention, mask_loss = map(bool, switches)
    rules = DocumentRules(
        0, reset_position_ids=reset_positions, reset_attention_mask=reset_attention, eod_mask_loss=mask_loss
    )
    samples_BS1 = np.random.default_rng(5).integers(0, 4, size=(20, 17))
    batch = collate(samples_BS1, rules)
    causal = torch.arange(16)[None, :] <= torch.arange(16)[:, None]
    for row in range(20):
        hidden, loss_mask, positions = theirs._get_ltor_masks_and_position_ids(
            torch.from_numpy(samples_BS1[row, :-1]), 0, reset_positions, reset_attention, mask_loss, True
        )
        assert torch.equal(batch.loss_mask_BS[row], loss_mask)
        ours = torch.arange(16) if batch.position_ids_BS is None else batch.position_ids_BS[row]
        assert torch.equal(ours, positions)
        seen = causal
        if batch.document_ids_BS is not None:
            seen = causal & (batch.document_ids_BS[row][:, None] == batch.document_ids_BS[row][None, :])
        assert torch.equal(seen, ~hidden[0])
