"""Masking: how much, what becomes of it, whole words, spans of n words, and nothing where nothing may be masked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron3d.data.masking import BertVocabulary, MaskingRules, choose_spans, find_words, mask_tokens
from megatron3d.data.tokenizer import build_tokenizer
from megatron3d.errors import ConfigError
from tests.data.chances import is_plausible
from tests.data.corpora import SHARED, needs_shared

VOCABULARY = BertVocabulary.without_tokenizer(1000)
CLS, SEP = VOCABULARY.cls, VOCABULARY.sep


def sample_of(length_a: int, length_b: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[CLS] A [SEP] B [SEP] of random text, and which of it is text."""
    draw = np.random.default_rng(seed)
    a, b = (draw.choice(VOCABULARY.text_ids, size=length) for length in (length_a, length_b))
    tokens = np.concatenate([[CLS], a, [SEP], b, [SEP]])
    return tokens, ~np.isin(tokens, (CLS, SEP))


def words_by_hand(tokens: NDArray[np.int64], whole_words: bool) -> list[list[int]]:
    """The positions of each word, one token after the other."""
    words: list[list[int]] = []
    for place, token in enumerate(tokens):
        if token in (CLS, SEP):
            continue
        if whole_words and VOCABULARY.continues_word[token] and tokens[place - 1] not in (CLS, SEP):
            words[-1].append(place)
        else:
            words.append([place])
    return words


def test_share_of_masked_tokens_is_the_probability() -> None:
    for probability in (0.05, 0.15, 0.4):
        total = predicted = 0
        for seed in range(300):
            tokens, is_text = sample_of(20 + seed % 200, 30 + seed % 71, seed)
            rules = MaskingRules(probability)
            masked = mask_tokens(tokens, is_text, VOCABULARY, rules, np.random.default_rng(seed))
            assert masked.predicted.sum() == max(1, round(len(tokens) * probability))
            total, predicted = total + len(tokens), predicted + int(masked.predicted.sum())
        assert predicted / total == pytest.approx(probability, rel=0.01)


def test_eight_in_ten_become_the_mask_one_a_random_token_and_one_stays() -> None:
    fates: Counter[str] = Counter()
    replacements = []
    for seed in range(600):
        tokens, is_text = sample_of(120, 130, seed)
        masked = mask_tokens(tokens, is_text, VOCABULARY, MaskingRules(), np.random.default_rng(10_000 + seed))
        for before, after in zip(tokens[masked.predicted], masked.tokens[masked.predicted]):
            fates["mask" if after == VOCABULARY.mask else "same" if after == before else "random"] += 1
            replacements += [after] if after not in (VOCABULARY.mask, before) else []
        assert np.array_equal(masked.tokens[~masked.predicted], tokens[~masked.predicted])
        assert np.array_equal(masked.labels[masked.predicted], tokens[masked.predicted])
        assert (masked.labels[~masked.predicted] == VOCABULARY.pad).all()
    trials = sum(fates.values())
    by_chance_the_same = 0.1 / len(VOCABULARY.text_ids)
    assert is_plausible(fates["mask"], trials, 0.8)
    assert is_plausible(fates["random"], trials, 0.1 - by_chance_the_same)
    assert is_plausible(fates["same"], trials, 0.1 + by_chance_the_same)
    halves = np.array(replacements) < np.median(VOCABULARY.text_ids)
    assert is_plausible(int(halves.sum()), len(halves), 0.5) and set(replacements) <= set(VOCABULARY.text_ids)


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 5])
def test_spans_have_n_words_with_odds_one_over_n(max_ngram: int) -> None:
    """The first span of a sample meets no other; words of 1 token, so its length is what was drawn.

    A span that would leave the sample is shorter: that is at most max_ngram of 500 words.
    """
    tokens = np.concatenate([[CLS], np.full(500, 4), [SEP]])
    is_text = ~np.isin(tokens, (CLS, SEP))
    rules = MaskingRules(max_ngram=max_ngram)
    lengths: Counter[int] = Counter()
    for seed in range(1200):
        spans = choose_spans(tokens, is_text, VOCABULARY.continues_word, rules, np.random.default_rng(seed))
        first, stop = spans[0]
        lengths[stop - first] += 1
    harmonic = sum(1 / n for n in range(1, max_ngram + 1))
    assert set(lengths) == set(range(1, max_ngram + 1))
    for n, count in lengths.items():
        assert is_plausible(count, 1200, min(1 / n / harmonic, 1 - 1e-12)), lengths


def test_words_are_masked_whole_or_not_at_all() -> None:
    partial = 0
    for seed in range(200):
        tokens, is_text = sample_of(60, 60, seed)
        for whole_words in (True, False):
            rules = MaskingRules(whole_words=whole_words)
            masked = mask_tokens(tokens, is_text, VOCABULARY, rules, np.random.default_rng(seed))
            shares = [masked.predicted[word].mean() for word in words_by_hand(tokens, True)]
            if whole_words:
                assert set(shares) <= {0.0, 1.0}
            partial += any(0 < share < 1 for share in shares)
    assert partial > 100  # without whole words, most samples have a word that is masked in part


@pytest.mark.parametrize("whole_words", [True, False])
def test_words_are_found_as_by_hand(whole_words: bool) -> None:
    for seed in range(50):
        tokens, is_text = sample_of(1 + seed % 20, seed % 7 + 1, seed)
        starts, stops = find_words(tokens, is_text, VOCABULARY.continues_word if whole_words else None)
        found = [list(range(first, stop)) for first, stop in zip(starts.tolist(), stops.tolist())]
        assert found == words_by_hand(tokens, whole_words)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    probability=st.floats(0.01, 0.9),
    max_ngram=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_spans_are_of_words_of_one_segment_apart_and_within_the_budget(
    lengths: tuple[int, int], probability: float, max_ngram: int, seed: int
) -> None:
    tokens, is_text = sample_of(*lengths, seed)
    rules = MaskingRules(probability, max_ngram=max_ngram)
    spans = choose_spans(tokens, is_text, VOCABULARY.continues_word, rules, np.random.default_rng(seed))
    words = words_by_hand(tokens, True)
    begins, ends = {word[0] for word in words}, {word[-1] + 1 for word in words}
    places = [place for first, stop in spans for place in range(first, stop)]
    assert len(places) == len(set(places)) <= rules.budget(len(tokens))
    for first, stop in spans:
        assert is_text[first:stop].all() and first in begins and stop in ends
        assert sum(first <= word[0] < stop for word in words) <= max_ngram
    if rules.budget(len(tokens)) >= max(map(len, words)):
        assert spans


def test_masking_depends_on_the_generator_alone() -> None:
    tokens, is_text = sample_of(100, 100, 0)
    one, again, other = (
        mask_tokens(tokens, is_text, VOCABULARY, MaskingRules(), np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(one.tokens, again.tokens) and np.array_equal(one.labels, again.labels)
    assert not np.array_equal(one.predicted, other.predicted)


@needs_shared
def test_vocabulary_of_bert_has_its_special_ids_and_its_pieces() -> None:
    path = SHARED / "tokenizers/bert-base-uncased/vocab.txt"
    tokenizer = build_tokenizer("BertWordPieceLowerCase", vocab_file=str(path))
    vocabulary = BertVocabulary.of_tokenizer(tokenizer)
    assert (vocabulary.cls, vocabulary.sep, vocabulary.mask, vocabulary.pad) == (101, 102, 103, 0)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert vocabulary.continues_word.tolist() == [line.startswith("##") for line in lines]
    assert len(vocabulary.text_ids) == 30522 - 4


def test_tokenizer_without_special_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"257 ids: it has no \[CLS\], \[SEP\], \[MASK\], \[PAD\]; use --tokenizer-"):
        BertVocabulary.of_tokenizer(build_tokenizer("ByteTokenizer"))


def test_mock_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="--vocab-size 4 leaves no token"):
        BertVocabulary.without_tokenizer(4)
