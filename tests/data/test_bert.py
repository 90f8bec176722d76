"""BERT samples: their form, what A and B are, labels, every sentence of an epoch, purity, and bad data by its place.

The tokens of these corpora count 4, 5, 6, ... through the whole file, so that a token says where it stands.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron3d.data.batch import BertBatch
from megatron3d.data.bert import BertForm, BertReader, BertSample, BertSamples, trim
from megatron3d.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron3d.data.loader import GlobalBatches
from megatron3d.data.masking import BertVocabulary, MaskingRules
from megatron3d.data.mock import MockBertSamples
from megatron3d.errors import DataError
from tests.data.chances import is_plausible
from tests.dist.pool import Pool

VOCABULARY = BertVocabulary.without_tokenizer(60_000)
TASKS = ["order", "next", None]


def form_of(seq_length: int = 43, task: str | None = "order", short: float = 0.1) -> BertForm:
    return BertForm(seq_length, VOCABULARY, MaskingRules(), short_seq_prob=short, sentence_task=task)


def write_sentences(prefix: Path, documents: list[list[int]]) -> IndexedDataset:
    """Documents given by the lengths of their sentences."""
    token = 4
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(list(range(token, token + sum(document))), document)
            token += sum(document)
    return IndexedDataset(prefix)


def random_documents(count: int, seed: int = 0, longest: int = 18) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(1, longest, size=draw.integers(2, 30)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    """200 documents of 2 to 29 sentences of 1 to 17 tokens."""
    return write_sentences(tmp_path_factory.mktemp("bert") / "d", random_documents(200))


def samples_of(dataset: IndexedDataset, form: BertForm, seed: int = 5) -> BertSamples:
    return BertSamples(dataset, range(dataset.num_documents), form=form, seed=seed)


def unmasked(sample: BertSample) -> tuple[list[int], list[int]]:
    """A and B before masking, after a look at the special tokens around them."""
    tokens = np.where(sample.predicted, sample.labels, sample.tokens)[: sample.num_tokens].tolist()
    assert tokens[0] == VOCABULARY.cls and tokens[-1] == VOCABULARY.sep
    a, _, b = (" ".join(map(str, tokens[1:-1]))).partition(f" {VOCABULARY.sep} ")
    return [int(word) for word in a.split()], [int(word) for word in b.split()]


def document_of(dataset: IndexedDataset, token: int) -> int:
    starts = np.cumsum([0, *dataset.lengths])[dataset.document_bounds] + 4
    return int(np.searchsorted(starts, token, side="right")) - 1


def epoch_of(samples: BertSamples, epoch: int) -> list[BertSample]:
    count = samples.num_samples_per_epoch
    return [samples.sample(epoch * count + index) for index in range(count)]


@pytest.mark.parametrize("task", TASKS)
def test_sample_is_cls_a_sep_b_sep_and_padding(corpus: IndexedDataset, task: str | None) -> None:
    for sample in epoch_of(samples_of(corpus, form_of(task=task)), 0):
        a, b = unmasked(sample)
        separators = 1 if task is None else 2
        assert a and bool(b) == (task is not None) and len(a) + len(b) <= 40
        assert sample.num_tokens == 1 + len(a) + len(b) + separators
        assert sample.token_types.tolist() == [0] * (len(a) + 2) + [1] * (sample.num_tokens - len(a) - 2) + [0] * (
            43 - sample.num_tokens
        )
        assert (sample.tokens[sample.num_tokens :] == VOCABULARY.pad).all()
        assert not sample.predicted[[0, len(a) + 1, *range(sample.num_tokens - 1, 43)]].any()
        assert all(later == earlier + 1 for part in (a, b) for earlier, later in pairwise(part))


def test_order_label_says_whether_a_and_b_are_swapped(corpus: IndexedDataset) -> None:
    labels = Counter()
    samples = samples_of(corpus, form_of())
    for sample in epoch_of(samples, 1):
        a, b = unmasked(sample)
        labels[sample.sentence_label] += 1
        first, second = (b, a) if sample.sentence_label else (a, b)
        assert first[-1] < second[0] <= first[-1] + 30 and document_of(corpus, a[0]) == document_of(corpus, b[0])
        if len(a) + len(b) < 40:  # a sample cut to the capacity may have lost tokens in its middle
            assert second[0] == first[-1] + 1
    assert is_plausible(labels[1], sum(labels.values()), 0.5)


@pytest.mark.parametrize("num_documents", [3, 200])
def test_next_label_says_whether_b_is_of_another_document(
    tmp_path: Path, corpus: IndexedDataset, num_documents: int
) -> None:
    """Also with 3 documents, where a third of all partners are of the same document, half of the B are random."""
    dataset = corpus if num_documents == 200 else write_sentences(tmp_path / "d", [[5] * 2000] * num_documents)
    samples = samples_of(dataset, form_of(task="next"))
    labels = Counter()
    for sample in epoch_of(samples, 1):
        a, b = unmasked(sample)
        labels[sample.sentence_label] += 1
        same = document_of(dataset, a[0]) == document_of(dataset, b[0])
        assert same == (sample.sentence_label == 0)
        if same:
            assert a[-1] < b[0] <= a[-1] + 30
    # labels come in pairs, one draw for both, so half as many draws decide
    assert is_plausible(labels[1] // 2, sum(labels.values()) // 2, 0.5)


def test_exchanged_b_fills_the_sample_about_as_well(corpus: IndexedDataset) -> None:
    samples = epoch_of(samples_of(corpus, form_of(task="next", short=0.0)), 0)
    fills = [[s.num_tokens for s in samples if s.sentence_label == label] for label in (0, 1)]
    assert np.mean(fills[1]) > 0.85 * np.mean(fills[0])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_sentence_of_a_document_is_used_once_an_epoch(
    tmp_path: Path, corpus: IndexedDataset, task: str | None, epoch: int
) -> None:
    """Where nothing is cut to the capacity (20 sentences of 5 tokens, samples of 40) that is every token."""
    even = write_sentences(tmp_path / "d", [[5] * 16] * 50)
    for dataset, is_even in ((even, True), (corpus, False)):
        shown = Counter(
            token
            for sample in epoch_of(samples_of(dataset, form_of(task=task)), epoch)
            for part in unmasked(sample)
            for token in part
        )
        assert set(shown.values()) == {1}
        share = len(shown) / dataset.num_tokens
        if task is None or (is_even and task == "order"):
            assert share == 1.0
        assert share > {"order": 0.97, "next": 0.9, None: 0.999}[task]


def test_long_sentences_and_lonely_ones_are_used(tmp_path: Path) -> None:
    dataset = write_sentences(tmp_path / "d", [[300, 2], [9], [0, 7, 0], [1], [200]])
    for task in ("order", None):
        shown = {
            token for s in epoch_of(samples_of(dataset, form_of(task=task)), 0) for p in unmasked(s) for token in p
        }
        missing = {token: document_of(dataset, token) for token in range(4, 4 + dataset.num_tokens)}
        missing = {token: document for token, document in missing.items() if token not in shown}
        single = 4 + 302 + 9 + 7  # one token alone has no order
        assert set(missing) - {single} == set() or (task == "order" and len(missing) <= 20)
        assert (single in missing) == (task == "order")


def test_sample_is_a_function_of_its_number_alone(corpus: IndexedDataset) -> None:
    for task in TASKS:
        one, again = samples_of(corpus, form_of(task=task)), samples_of(corpus, form_of(task=task))
        numbers = np.random.default_rng(0).permutation(3 * one.num_samples_per_epoch)[:200].tolist()
        by_number = {number: one.sample(number) for number in numbers}
        for number in sorted(numbers):
            sample = again.sample(number)
            assert np.array_equal(sample.tokens, by_number[number].tokens)
            assert np.array_equal(sample.labels, by_number[number].labels)
            assert sample.sentence_label == by_number[number].sentence_label


def _tokens_read_elsewhere(rank: int, world_size: int, prefix: str, task: str) -> list[list[int]]:
    reader = BertReader(samples_of(IndexedDataset(prefix), form_of(task=task)))
    return reader(1000 * rank, 2).tokens_BS.tolist() + reader(7, 20).tokens_BS.tolist()


@pytest.mark.parametrize("task", ["order", "next"])
def test_other_processes_read_the_same_samples(corpus: IndexedDataset, pool: Pool, task: str) -> None:
    here = BertReader(samples_of(corpus, form_of(task=task)))(7, 20).tokens_BS.tolist()
    assert [tokens[2:] for tokens in pool.run(2, _tokens_read_elsewhere, corpus.prefix, task)] == [here, here]


def test_epochs_differ_in_order_in_masks_and_in_short_samples(corpus: IndexedDataset) -> None:
    samples = samples_of(corpus, form_of(task=None))
    epochs = [epoch_of(samples, epoch) for epoch in (0, 1)]
    texts = [[tuple(unmasked(sample)[0]) for sample in epoch] for epoch in epochs]
    assert texts[0] != texts[1]
    masks = [{text: s.predicted.tolist() for text, s in zip(t, epoch)} for t, epoch in zip(texts, epochs)]
    again = [text for text in masks[0] if text in masks[1] and len(text) > 30]
    assert len(again) > 100 and sum(masks[0][text] == masks[1][text] for text in again) <= 0.02 * len(again)
    assert set(texts[0]) - set(texts[1])


def test_the_only_sample_of_an_epoch_is_masked_anew_each_time(tmp_path: Path) -> None:
    samples = samples_of(write_sentences(tmp_path / "d", [[19, 19]]), form_of(short=0.0))
    assert samples.num_samples_per_epoch == 1
    drawn = [samples.sample(epoch) for epoch in range(20)]
    assert len({tuple(sample.predicted) for sample in drawn}) > 15 and {s.sentence_label for s in drawn} == {0, 1}


def test_counts_of_masked_tokens_differ_between_samples_and_have_the_share(corpus: IndexedDataset) -> None:
    batch = BertReader(samples_of(corpus, form_of()))(0, 400)
    counts = batch.loss_mask_BS.sum(dim=1)
    assert len(counts.unique()) > 3
    assert batch.loss_count() / batch.padding_mask_BS.sum() == pytest.approx(0.15, rel=0.03)


@pytest.mark.parametrize("task", TASKS)
def test_batch_has_the_tensors_that_a_model_needs(corpus: IndexedDataset, task: str | None) -> None:
    samples = samples_of(corpus, form_of(task=task))
    batch = BertReader(samples)(10, 6)
    assert isinstance(batch, BertBatch) and batch.num_samples == 6
    int64 = (batch.tokens_BS, batch.labels_BS, batch.token_types_BS)
    assert all(tensor.shape == (6, 43) and tensor.dtype == torch.int64 for tensor in int64)
    assert batch.loss_mask_BS.dtype == torch.float32 and batch.padding_mask_BS.dtype == torch.bool
    assert torch.equal(batch.padding_mask_BS, batch.tokens_BS != VOCABULARY.pad)
    for row in range(6):
        sample = samples.sample(10 + row)
        assert batch.tokens_BS[row].tolist() == sample.tokens.tolist()
        assert batch.loss_mask_BS[row].bool().tolist() == sample.predicted.tolist()
        assert batch.sentence_labels_B is None or batch.sentence_labels_B[row] == sample.sentence_label
    assert (batch.sentence_labels_B is None) == (task is None)
    assert batch.sentence_count().item() == (0 if task is None else 6)
    assert batch.loss_count().dtype == batch.sentence_count().dtype == torch.int64


def test_micro_batches_put_together_are_the_batch(corpus: IndexedDataset) -> None:
    batch = BertReader(samples_of(corpus, form_of()))(0, 6)
    parts = batch.split(2)
    for name, value in vars(batch).items():
        values = [vars(part)[name] for part in parts]
        if isinstance(value, torch.Tensor):
            assert torch.equal(torch.cat(values), value)
        else:
            assert values == [value] * len(parts)
    assert sum(part.sentence_count() for part in parts) == 6
    assert batch.to("meta").sentence_labels_B.device.type == "meta"


def test_global_batch_is_the_same_list_of_samples_at_every_layout(corpus: IndexedDataset) -> None:
    samples = samples_of(corpus, form_of())
    rows = []
    for dp_size, workers in ((1, 0), (2, 2), (4, 1)):
        with GlobalBatches(BertReader(samples), num_workers=workers) as reader:
            parts = [reader.read(24, 8, rank, dp_size) for rank in range(dp_size)]
        rows.append(torch.cat([part.tokens_BS for part in parts]).tolist())
    assert rows[0] == rows[1] == rows[2] == [samples.sample(24 + row).tokens.tolist() for row in range(8)]


def test_trimming_takes_from_the_longer_and_from_both_ends() -> None:
    fronts = Counter()
    for seed in range(300):
        (a, a_stop), (b, b_stop) = trim((100, 130), (200, 210), 30, np.random.default_rng(seed))
        assert (a_stop - a, b_stop - b) == (20, 10) and 100 <= a < a_stop <= 130
        fronts[a - 100] += 1
    assert is_plausible(sum(front * count for front, count in fronts.items()), 3000, 0.5)
    equal = trim((0, 20), (20, 40), 31, np.random.default_rng(0))
    assert sorted(stop - first for first, stop in equal) == [15, 16]


def test_location_names_the_very_token(tmp_path: Path) -> None:
    dataset = write_sentences(tmp_path / "d", [[5, 7, 3], [2, 8]])
    samples = samples_of(dataset, form_of())
    for number in range(4):
        sample = samples.sample(number)
        tokens = np.where(sample.predicted, sample.labels, sample.tokens)
        starts = np.cumsum([0, *dataset.lengths])
        for position in range(43):
            where = samples.locate(number, position)
            if tokens[position] in (VOCABULARY.cls, VOCABULARY.sep, VOCABULARY.pad):
                assert where.endswith(f"position {position}, a special token or padding")
                continue
            token = tokens[position] - 4
            sequence = int(np.searchsorted(starts, token, side="right")) - 1
            document = document_of(dataset, tokens[position])
            offset = token - starts[sequence]
            assert where == f"{tmp_path / 'd.bin'}, document {document}, sequence {sequence}, token {offset}"


def test_id_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([5, 6, 7, 60_000, 9], [3, 2])
    with pytest.raises(DataError) as caught:
        samples_of(IndexedDataset(tmp_path / "d"), form_of()).sample(0)
    assert str(caught.value) == (
        f"{tmp_path / 'd.bin'}, document 0, sequence 1, token 0: token id 60000 is outside the vocabulary of 60000; "
        f"use the tokenizer and vocabulary the data was preprocessed with."
    )


def test_documents_without_a_sample_are_refused_with_the_numbers(tmp_path: Path) -> None:
    dataset = write_sentences(tmp_path / "d", [[1], [], [0, 1]])
    with pytest.raises(DataError, match="documents 0 to 3 hold 2 tokens in 3 sentences, and no document has the 2"):
        samples_of(dataset, form_of())


def test_next_sentence_of_one_document_is_refused(tmp_path: Path) -> None:
    dataset = write_sentences(tmp_path / "d", [[5] * 50, [1]])
    with pytest.raises(DataError, match="are one document with text, but --bert-sentence-task next takes"):
        samples_of(dataset, form_of(task="next"))
    assert samples_of(dataset, form_of()).sample(0).sentence_label in (0, 1)


def test_negative_number_is_refused(corpus: IndexedDataset) -> None:
    with pytest.raises(IndexError, match="sample -1"):
        samples_of(corpus, form_of()).sample(-1)


@pytest.mark.parametrize("task", TASKS)
def test_mock_samples_have_the_form_of_real_ones(task: str | None) -> None:
    stream = MockBertSamples("train", form_of(task=task), seed=1)
    labels = [stream.sample(number).sentence_label for number in range(400)]
    for number in range(50):
        sample, again = stream.sample(number), MockBertSamples("train", form_of(task=task), seed=1).sample(number)
        a, b = unmasked(sample)
        assert a and bool(b) == (task is not None) and np.array_equal(sample.tokens, again.tokens)
    assert labels[0] is None if task is None else is_plausible(sum(labels), 400, 0.5)
    assert not np.array_equal(
        stream.sample(0).tokens, MockBertSamples("valid", form_of(task=task), seed=1).sample(0).tokens
    )


def test_mock_sentences_tell_their_order() -> None:
    """The step from the end of A to the beginning of B is the cycle's nine times in ten, unless they are swapped."""
    stream = MockBertSamples("train", form_of(), seed=1)
    texts = [(unmasked(sample), sample.sentence_label) for sample in map(stream.sample, range(400))]
    steps = Counter(pair for (a, b), _ in texts for part in (a, b) for pair in pairwise(part))
    follows = {first: max((n, second) for (one, second), n in steps.items() if one == first)[1] for first, _ in steps}
    hits = {label: [follows.get(a[-1]) == b[0] for (a, b), own in texts if own == label] for label in (0, 1)}
    assert np.mean(hits[0]) > 0.75 and np.mean(hits[1]) < 0.1
