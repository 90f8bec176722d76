"""Fill-in-the-Middle: undone it gives the document's bytes, and it depends on the sample's number alone.

The undoing here reads nothing but the marks; bytes are compared through the letters of a byte-level vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.sample_counts import SampleCounts
from megatron3d.config.sections.data import DataConfig
from megatron3d.data.build import GPTData, build_data
from megatron3d.data.fim import FillInTheMiddle, FimTokens, fill_in_the_middle
from megatron3d.data.gpt import DocumentRules, collate
from megatron3d.data.tokenizer import ByteTokenizer
from megatron3d.data.tokenizer_interface import LibraryTokenizer, SpecialIds
from megatron3d.errors import ConfigError
from tests.data.chances import is_plausible
from tests.data.corpora import write_documents

MARKS = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<file>"]
EOD, PREFIX, MIDDLE, SUFFIX, PAD, FILE = range(6)
MODEL = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 24 --vocab-size 300 "
    "--max-position-embeddings 24 --micro-batch-size 1 --lr 1e-3 --train-iters 12 --eval-iters 0 --device cpu"
)
TEXT = "def add(first, second):\n    return first + second  # the sum of the two\n" * 3


def byte_level_tokenizer() -> LibraryTokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    library.train_from_iterator([TEXT], trainer)
    return LibraryTokenizer(library, SpecialIds(eod=EOD))


TOKENIZER = byte_level_tokenizer()
NAMES = TOKENIZER.tokens()
FIM = FillInTheMiddle(FimTokens(PREFIX, MIDDLE, SUFFIX, PAD, EOD), TOKENIZER, 1.0, 0.5, 0.0, None, 7)


def letters(ids: list[int]) -> str:
    """A letter for each byte."""
    return "".join(str(NAMES[id]) for id in ids)


def undone(ids: list[int]) -> list[int]:
    """The tokens of a document in the order of its text."""
    if ids[:1] != [PREFIX]:
        return ids
    if ids[1] == SUFFIX:
        middle = ids.index(MIDDLE)
        return ids[middle + 1 :] + ids[2:middle]
    suffix, middle = ids.index(SUFFIX), ids.index(MIDDLE)
    return ids[1:suffix] + ids[middle + 1 :] + ids[suffix + 1 : middle]


def first_document(tokens: list[int], fim: FillInTheMiddle, number: int) -> list[int]:
    """The permuted form of a document; empty ones behind it take the cut at the end of the sample."""
    sample = np.array([*tokens, *[EOD] * 50], dtype=np.int64)
    made = fim.permuted(sample, number)
    assert made.shape == sample.shape and made.dtype == np.int64
    return made[: made.tolist().index(EOD)].tolist()


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), cut=st.tuples(st.integers(0, 5), st.integers(0, 5)), number=st.integers(0, 2**40))
def test_undone_it_is_the_document_even_where_the_sample_cuts_characters(
    text: str, cut: tuple[int, int], number: int
) -> None:
    tokens = TOKENIZER.encode(text)[cut[0] :]
    tokens = tokens[: len(tokens) - cut[1]]
    for spm_rate in (0.0, 1.0):
        made = first_document(tokens, replace(FIM, spm_rate=spm_rate), number)
        assert letters(undone(made)) == letters(tokens)
        assert (made[:2] == [PREFIX, SUFFIX]) >= (spm_rate == 1.0 and bool(tokens))
        assert made.count(PREFIX) == made.count(SUFFIX) == made.count(MIDDLE) == bool(tokens)


def test_rates_and_cuts_are_those_asked_for() -> None:
    """1,000 samples of one document: the share permuted, of those SPM, and cuts that are even over the text."""
    fim, tokens, count = replace(FIM, rate=0.3, spm_rate=0.8), TOKENIZER.encode("abcdefghij"), 1000
    made = [first_document(tokens, fim, number) for number in range(count)]
    permuted = [ids for ids in made if ids[0] == PREFIX]
    assert is_plausible(len(permuted), count, 0.3)
    assert is_plausible(sum(ids[1] == SUFFIX for ids in permuted), len(permuted), 0.8)
    # of two even cuts among 11 places both are at the beginning with probability 1 / 121
    suffixes = [len(TOKENIZER.decode(ids[2 : ids.index(MIDDLE)])) for ids in permuted if ids[1] == SUFFIX]
    assert is_plausible(suffixes.count(10), len(suffixes), 1 / 121)
    assert is_plausible(suffixes.count(0), len(suffixes), 21 / 121)


def test_rate_of_nothing_gives_the_very_tokens() -> None:
    sample = np.array([EOD, EOD, *TOKENIZER.encode(TEXT), EOD], dtype=np.int64)
    for rates in ({"rate": 0.0}, {"rate": 1.0, "fragment_rate": 0.0, "tokens": replace(FIM.tokens, split=EOD + 6)}):
        fim = replace(FIM, **rates)
        if "tokens" in rates:
            sample[5] = EOD + 6
        assert np.array_equal(fim.permuted(sample, 3), sample)


def test_ends_of_documents_stay_where_they_are_in_turn() -> None:
    """Two in a row stay two, and each document is permuted by itself."""
    a, b = TOKENIZER.encode("one two"), TOKENIZER.encode("three")
    made = FIM.permuted(np.array([*a, EOD, EOD, *b, EOD, *TOKENIZER.encode(TEXT)]), 11).tolist()
    first = made.index(EOD)
    assert made[first + 1] == EOD
    third = made.index(EOD, first + 2)
    assert letters(undone(made[:first])) == letters(a)
    assert letters(undone(made[first + 2 : third])) == letters(b)


def test_fragments_are_permuted_one_by_one() -> None:
    fim = replace(FIM, tokens=replace(FIM.tokens, split=FILE), fragment_rate=1.0)
    fragments = [TOKENIZER.encode(text) for text in ("first file", "second", "third one")]
    made = first_document([*fragments[0], FILE, *fragments[1], FILE, *fragments[2]], fim, 5)
    places = [place for place, id in enumerate(made) if id == FILE]
    found = [made[: places[0]], made[places[0] + 1 : places[1]], made[places[1] + 1 :]]
    assert [letters(undone(ids)) for ids in found] == [letters(ids) for ids in fragments]
    assert all(ids[0] == PREFIX for ids in found)


def test_texts_with_the_prefix_are_left_alone() -> None:
    tokens = TOKENIZER.encode("#!/bin/sh and more")
    fim = replace(FIM, no_prefix="#!")
    assert first_document(tokens, fim, 0) == tokens
    assert first_document(TOKENIZER.encode("no #! here"), fim, 0)[0] == PREFIX


def test_what_is_too_short_is_filled_up_without_loss() -> None:
    """Single bytes, which are tokenized anew into fewer tokens."""
    sample = np.array([id for letter in "return first" for id in TOKENIZER.encode(letter)] * 8, dtype=np.int64)
    made = FIM.permuted(sample, 0)
    assert made[-1] == PAD and letters(undone([id for id in made.tolist() if id != PAD])) == letters(sample.tolist())
    batch = collate(made[None], DocumentRules(EOD, pad_token=FIM.padding))
    assert batch.loss_mask_BS[0].tolist() == [float(label != PAD) for label in made[1:]]
    assert replace(FIM, tokens=replace(FIM.tokens, pad=EOD)).padding is None


@pytest.fixture
def prefixes(tmp_path: Path) -> tuple[str, str]:
    ids = TOKENIZER.encode(TEXT)
    for name, lengths in (("A", (30, 50, 9, 70)), ("B", (80, 20))):
        write_documents(tmp_path / name, [[*ids[:length], EOD] for length in lengths])
    return str(tmp_path / "A"), str(tmp_path / "B")


def built(**options: object) -> GPTData:
    data = DataConfig(fim_data=True, fim_rate=0.7, tokenizer_type="HuggingFaceTokenizer", split="1,0,0", **options)
    argv = f"{MODEL} --mock-data".split()
    model = resolve(parse_args(argv, program="p", description="d", log=lambda line: None), 1).model
    counts = SampleCounts(train=12, valid=0, test=0, train_read=12, valid_read=0)
    data_of_run = build_data(data, model, tokenizer=TOKENIZER, eod_token=EOD, counts=counts)
    assert isinstance(data_of_run, GPTData)
    return data_of_run


@pytest.mark.parametrize("order", ["computed", "megatron"])
def test_batches_of_blends_are_permuted_by_number(prefixes: tuple[str, str], order: str) -> None:
    """In both orders, and the same whatever part of a batch is read, in whichever order."""
    data = built(data_path=("0.5", prefixes[0], "0.5", prefixes[1]), sample_order=order)
    assert data.train is not None and data.fim is not None
    reader = data.reader(data.train)
    whole = reader(0, 12)
    for number in (9, 2, 11):
        row = reader(number, 1)
        expected = data.fim.permuted(data.train.sample(number), number)
        assert row.tokens_BS[0].tolist() == whole.tokens_BS[number].tolist() == expected[:-1].tolist()
        assert row.labels_BS[0].tolist() == expected[1:].tolist()
    rows: list[NDArray[np.int64]] = [data.train.sample(number) for number in range(12)]
    assert any(whole.tokens_BS[n].tolist() != rows[n][:-1].tolist() for n in range(12))
    assert "permuted by --fim-data, token 3" in reader.stream.locate(2, 3)


def test_tokens_that_are_missing_are_named_all_at_once() -> None:
    data = DataConfig(
        fim_data=True, tokenizer_type="HuggingFaceTokenizer", fim_prefix_token="<PRE>", fim_eod_token="</s>"
    )
    with pytest.raises(ConfigError) as caught:
        fill_in_the_middle(data, TOKENIZER, EOD)
    lines = str(caught.value).splitlines()
    assert [line.split()[:2] for line in lines] == [["--fim-prefix-token", "<PRE>"], ["--fim-eod-token", "</s>"]]
    assert "add it to its special tokens, or give the name" in lines[0]
    with pytest.raises(ConfigError, match="--fim-middle-token <fim_middle> is no token of the tokenizer"):
        fill_in_the_middle(replace(data, tokenizer_type="ByteTokenizer"), ByteTokenizer(), 256)
    same = DataConfig(fim_data=True, fim_prefix_token="<fim_middle>")
    with pytest.raises(ConfigError, match="are not three tokens; give three names"):
        fill_in_the_middle(same, TOKENIZER, EOD)
    assert fill_in_the_middle(DataConfig(), None, None) == (None, ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--fim-data --mock-data --tokenizer-type ByteTokenizer", "but --mock-data has none"),
        ("--fim-data --data-path P", "give --tokenizer-type"),
        (
            "--fim-data --data-path P --tokenizer-type ByteTokenizer --fim-split-sample X",
            "--fim-fragment-rate is missing",
        ),
        ("--data-path P --fim-fragment-rate 0.2", "which --fim-split-sample makes"),
        ("--fim-data --data-path P --tokenizer-type ByteTokenizer --fim-rate 1.5", "at least 0 and at most 1"),
    ],
)
def test_options_that_contradict_are_told_at_the_start(options: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(parse_args(f"{MODEL} {options}".split(), program="p", description="d", log=lambda line: None), 1)
