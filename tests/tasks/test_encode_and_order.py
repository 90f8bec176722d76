"""Samples as token ids, and the batches they make up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.data.tokenizer import Tokenizer, build_tokenizer
from megatron3d.errors import DataError
from megatron3d.tasks.glue.encode import cut, encode, hide_tokens
from megatron3d.tasks.glue.order import PlannedStep, evaluation_batches, padded_share, training_steps
from megatron3d.tasks.glue.read import SampleTable

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
CLS, SEP, PAD, MASK = 2, 3, 0, 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    return build_tokenizer("BertWordPieceLowerCase", vocab_file=str(path))


def rows(*texts: tuple[str, ...], labels: tuple | None = None) -> SampleTable:
    return SampleTable(Path("x.tsv"), texts, labels)


def test_pairs_have_their_segments_and_padding(tokenizer: Tokenizer) -> None:
    encoded = encode(rows(("a b", "c"), ("d", "e f g"), labels=(1, 0)), tokenizer, max_length=16)
    batch = encoded.batch(np.array([0, 1]), np.ones(2, np.float32), 8)
    a, b, c, d, e, f, g = range(5, 12)
    assert batch.tokens_BS.tolist() == [[CLS, a, b, SEP, d, SEP, PAD, PAD], [CLS, c, SEP, e, f, g, SEP, PAD]]
    assert batch.token_types_BS.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]]
    assert batch.padding_mask_BS.tolist() == [[True] * 6 + [False] * 2, [True] * 7 + [False]]
    assert batch.labels_B.tolist() == [1, 0] and batch.labels_B.dtype == torch.int64
    assert encoded.num_cut == 0


def test_a_batch_without_padding_has_no_mask_and_values_are_fp32(tokenizer: Tokenizer) -> None:
    encoded = encode(rows(("a b", "c d"), labels=(0.5, 2.0)), tokenizer, max_length=16)
    batch = encoded.batch(np.array([1, 0]), np.array([1.0, 0.0], np.float32), 4)
    assert batch.padding_mask_BS is None and batch.model_inputs()["attention_mask_BST"] is None
    assert batch.labels_B.dtype == torch.float32 and batch.labels_B.tolist() == [2.0, 0.5]
    assert batch.counts()["samples"].item() == 1


def test_long_samples_are_cut_and_counted(tokenizer: Tokenizer) -> None:
    encoded = encode(rows(("a b c d e f g h", "a")), tokenizer, max_length=6)
    assert encoded.lengths_N.tolist() == [6, 3] and encoded.num_cut == 1
    assert encoded.tokens_T[:6].tolist() == [CLS, 5, 6, 7, 8, SEP]


def test_an_empty_text_is_still_a_sample(tokenizer: Tokenizer) -> None:
    assert encode(rows(("",), ("a",)), tokenizer, max_length=8).tokens_T.tolist() == [CLS, SEP, 5, SEP]


def test_a_tokenizer_without_berts_tokens_is_refused() -> None:
    with pytest.raises(DataError, match=r"no \[CLS\] and no \[SEP\] and no \[PAD\]"):
        encode(rows(("a",)), build_tokenizer("ByteTokenizer"), max_length=8)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 3),
)
def test_hidden_tokens_are_masks_and_never_special(
    tokenizer: Tokenizer, pairs: list[tuple[int, int]], probability: float, epoch: int
) -> None:
    texts = [tuple("a " * count for count in column) for column in zip(*pairs)]
    samples = encode(rows(*texts), tokenizer, max_length=64)
    hidden = hide_tokens(samples, probability, seed=1, epoch=epoch)
    again = hide_tokens(samples, probability, seed=1, epoch=epoch)
    assert np.array_equal(hidden.tokens_T, again.tokens_T) and hidden.tokens_T.dtype == samples.tokens_T.dtype
    changed = hidden.tokens_T != samples.tokens_T
    assert (hidden.tokens_T[changed] == MASK).all()
    assert not np.isin(samples.tokens_T[changed], (CLS, SEP)).any()
    assert probability > 0 or not changed.any()


def test_the_share_of_hidden_tokens_is_the_probability_and_others_in_each_epoch(tokenizer: Tokenizer) -> None:
    samples = encode(rows(("a " * 60,) * 500), tokenizer, max_length=64)
    first, second = (hide_tokens(samples, 0.2, seed=1, epoch=epoch).tokens_T == MASK for epoch in (0, 1))
    assert 0.19 < first.sum() / 30000 < 0.21
    assert 0.03 < (first & second).sum() / 30000 < 0.05
    assert samples.mask == MASK and not (samples.tokens_T == MASK).any(), "the samples themselves stay as they are"


@given(st.integers(0, 30), st.integers(0, 30), st.integers(2, 40))
def test_a_pair_is_cut_as_in_the_papers_code(first: int, second: int, room: int) -> None:
    a, b = [0] * first, [1] * second
    while len(a) + len(b) > room:  # the loop of the released code
        (a if len(a) > len(b) else b).pop()
    assert tuple(map(list, cut(([0] * first, [1] * second), room))) == (a, b)


LENGTHS = st.lists(st.integers(3, 128), min_size=1, max_size=300).map(np.array)


SIZES = st.sampled_from([(1, 1), (4, 4), (4, 1), (16, 8), (32, 8), (32, 32)])  # of a step and of its groups


@given(LENGTHS, SIZES, st.sampled_from([1, 8]), st.integers(0, 5))
def test_an_epoch_has_every_sample_once_in_batches_that_fit(
    lengths: np.ndarray, sizes: tuple[int, int], multiple: int, epoch: int
) -> None:
    step, group = sizes
    steps = training_steps(lengths, step_size=step, group_size=group, multiple=multiple, seed=7, epoch=epoch)
    batches = [batch for one in steps for batch in one.batches]
    counted = np.concatenate([batch.indices_R[batch.weights_R > 0] for batch in batches])
    assert sorted(counted.tolist()) == list(range(len(lengths)))
    assert len(steps) == -(-len(lengths) // step)
    assert {len(one.batches) for one in steps} == {step // group}, "every step has as many micro-batches"
    for batch in batches:
        assert len(batch.indices_R) == group and batch.length % multiple == 0
        assert lengths[batch.indices_R].max() <= batch.length < lengths[batch.indices_R].max() + multiple


@given(LENGTHS, st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_the_parts_of_the_ranks_make_up_the_step_and_are_equally_long(lengths: np.ndarray, dp: int, epoch: int) -> None:
    for step in training_steps(lengths, step_size=8, group_size=4, multiple=8, seed=1, epoch=epoch):
        parts = [step.part(rank, dp) for rank in range(dp)]
        assert sum(part.num_samples for part in parts) == step.num_samples
        for number, batch in enumerate(step.batches):
            shares = [part.batches[number] for part in parts]
            assert np.concatenate([share.indices_R for share in shares]).tolist() == batch.indices_R.tolist()
            assert {share.length for share in shares} == {batch.length}


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 1000)

    def order(seed: int, epoch: int) -> list[list[int]]:
        steps = training_steps(lengths, step_size=8, group_size=8, multiple=1, seed=seed, epoch=epoch)
        return [batch.indices_R.tolist() for step in steps for batch in step.batches]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_buckets_save_nearly_all_padding_and_batches_alternate() -> None:
    lengths = np.random.default_rng(0).geometric(0.08, 20000).clip(3, 100)
    steps = training_steps(lengths, step_size=32, group_size=32, multiple=1, seed=1, epoch=0)
    shuffled = lengths.reshape(-1, 32)
    unsorted_share = 1 - lengths.sum() / (shuffled.max(1) * 32).sum()
    assert padded_share(steps, lengths) < 0.1 < 0.5 < unsorted_share
    sizes = np.array([batch.length for step in steps for batch in step.batches])
    assert abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < 0.1


def test_small_groups_mix_lengths_within_a_step_without_padding() -> None:
    lengths = np.random.default_rng(0).geometric(0.08, 20000).clip(3, 100)

    def steps(group: int) -> list[PlannedStep]:
        return training_steps(lengths, step_size=128, group_size=group, multiple=1, seed=1, epoch=0)

    def spread(group: int) -> float:
        """How far the mean length of a step is from that of all samples, on average."""
        means = [lengths[np.concatenate([batch.indices_R for batch in step.batches])].mean() for step in steps(group)]
        return float(np.abs(np.array(means) - lengths.mean()).mean())

    assert padded_share(steps(16), lengths) <= padded_share(steps(128), lengths) + 0.01
    assert spread(16) < spread(128) / 2


def test_evaluation_goes_from_short_to_long() -> None:
    lengths = np.array([9, 3, 5, 4, 8])
    batches = evaluation_batches(lengths, batch_size=2, multiple=1)
    assert [batch.indices_R.tolist() for batch in batches] == [[1, 3], [2, 4], [0, 0]]
    assert [batch.length for batch in batches] == [4, 8, 9]
    assert batches[-1].weights_R.tolist() == [1.0, 0.0] and batches[-1].num_samples == 1
