"""From options to streams: splits, blends by weight or size, per-split paths, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron3d.config.sections.data import DataConfig
from megatron3d.data.blend import Blend
from megatron3d.data.blend_history import BlendHistory, continued_blend
from megatron3d.data.build import BertData, GPTData, build_bert_data, build_gpt_data
from megatron3d.data.content import content_of
from megatron3d.data.gpt import GPTSamples
from megatron3d.data.indexed import IndexedDatasetWriter
from megatron3d.data.source_names import source_names
from megatron3d.data.tokenizer import Tokenizer, build_tokenizer
from megatron3d.errors import ConfigError, DataError
from tests.data.corpora import counting_documents, write_documents


def build(seq_length: int = 4, eod_token: int | None = None, **options: object) -> GPTData:
    return build_gpt_data(DataConfig(**options), seq_length=seq_length, vocab_size=1000, eod_token=eod_token)


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[str, str]:
    """A: 100 documents of 10 tokens. B: 100 documents of 30 tokens."""
    write_documents(tmp_path / "A", counting_documents([10] * 100))
    write_documents(tmp_path / "B", counting_documents([30] * 100))
    return str(tmp_path / "A"), str(tmp_path / "B")


def test_one_corpus_is_split_by_documents(corpora: tuple[str, str]) -> None:
    data = build(data_path=(corpora[0],), split="80,15,5")
    parts = (data.train, data.valid, data.test)
    assert all(isinstance(part, GPTSamples) for part in parts)
    assert [part.documents for part in parts] == [range(80), range(80, 95), range(95, 100)]


def test_empty_splits_are_none(corpora: tuple[str, str]) -> None:
    data = build(data_path=(corpora[0],), split="100,0,0")
    assert data.valid is None and data.test is None and data.notes == ()


def test_weights_make_a_blend(corpora: tuple[str, str]) -> None:
    data = build(data_path=("0.7", corpora[0], "0.3", corpora[1]))
    assert isinstance(data.train, Blend) and data.train.weights == (7, 3)
    assert "70.0000% " + corpora[0] in data.train.describe()


def test_sizes_are_the_weights_where_none_are_given(corpora: tuple[str, str]) -> None:
    data = build(data_path=corpora)
    assert isinstance(data.train, Blend) and data.train.weights == (1, 3)


def test_a_temperature_weights_corpora_without_weights_alone(corpora: tuple[str, str], tmp_path: Path) -> None:
    data = build(data_path=corpora, data_temperature=2.0)  # of 969 and 2,907 tokens
    assert np.divide(*data.train.weights) == pytest.approx(3**-0.5, abs=1e-4)
    assert np.divide(*data.valid.weights) == pytest.approx(3**-0.5, abs=1e-4)
    (tmp_path / "args").write_text(f"2 {corpora[0]} 1 {corpora[1]}")
    with pytest.raises(ConfigError, match=f"--data-args-path {tmp_path}/args gives weights; drop one of both"):
        build(data_args_path=str(tmp_path / "args"), data_temperature=2.0)


def test_validation_corpora_are_streams_of_their_own_by_name(corpora: tuple[str, str], tmp_path: Path) -> None:
    sets = {"multiple_validation_sets": True}
    data = build(data_path=("0.9", corpora[0], "0.1", corpora[1]), **sets)
    assert list(data.valid_sources.values()) == list(data.valid.streams)
    assert list(data.valid_sources) == ["A", "B"]
    named = build(data_path=corpora, **sets, validation_set_names=("en", "de"))
    assert list(named.valid_sources) == ["en", "de"]
    write_documents(tmp_path / "few", counting_documents([30] * 5))
    left_out = build(data_path=(corpora[0], str(tmp_path / "few"), corpora[1]), split="95,5,0", **sets)
    assert list(left_out.valid_sources) == ["A", "B"]
    with pytest.raises(ConfigError, match="--validation-set-names en are 1 names for 2 validation corpora"):
        build(data_path=corpora, **sets, validation_set_names=("en",))
    alone = build(data_path=corpora[:1], **sets)
    assert alone.valid_sources == {} and "there is no second validation corpus" in alone.notes[-1]


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["out/en", "out/de"], ("en", "de")),
        (["x/en/text", "x/de/text", "x/all"], ("en/text", "de/text", "all")),
        (["a/b/c", "d/b/c", "c"], ("a/b/c", "d/b/c", "c")),
        (["out/en", "out/en", "/out/en"], ("out/en", "out/en (2)", "//out/en")),
    ],
)
def test_names_of_sources_are_the_shortest_ends_of_their_prefixes(prefixes: list[str], names: tuple[str, ...]) -> None:
    assert source_names(prefixes, ()) == names


def test_weights_from_a_file_are_those_of_the_command_line(corpora: tuple[str, str], tmp_path: Path) -> None:
    words = ("2", corpora[0], "1", corpora[1])
    (tmp_path / "args").write_text(f"2 {corpora[0]}\n1 {corpora[1]}\n")
    from_file, direct = build(data_args_path=str(tmp_path / "args")), build(data_path=words)
    assert [from_file.train.sample(n).tolist() for n in range(30)] == [
        direct.train.sample(n).tolist() for n in range(30)
    ]


def test_paths_of_each_split_are_used_whole(corpora: tuple[str, str]) -> None:
    data = build(train_data_path=(corpora[0],), valid_data_path=(corpora[1],))
    assert data.train.documents == data.valid.documents == range(100)
    assert data.valid.dataset.prefix == corpora[1] and data.test is None


def test_same_options_give_the_same_stream_and_another_seed_another(corpora: tuple[str, str]) -> None:
    first, again, other = (build(data_path=corpora, seed=seed) for seed in (1, 1, 2))
    samples = [[data.train.sample(n).tolist() for n in range(40)] for data in (first, again, other)]
    assert samples[0] == samples[1] != samples[2]


def test_split_that_leaves_no_training_document_is_refused_with_the_numbers(tmp_path: Path) -> None:
    write_documents(tmp_path / "d", counting_documents([50, 50]))
    with pytest.raises(DataError) as caught:
        build(data_path=(str(tmp_path / "d"),), split="1,50,49")
    assert str(caught.value) == (
        f"--split 1,50,49 leaves no training document of {tmp_path / 'd'}, which has 2; give training a larger first "
        f"share."
    )


def test_training_documents_too_short_are_refused(corpora: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="documents 0 to 97 hold 970 tokens, but one sample of --seq-length 2000 needs"):
        build(data_path=(corpora[0],), seq_length=2000)


def test_validation_too_short_is_refused_but_a_test_split_is_left_out_with_a_note(corpora: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="documents 97 to 100 hold 30 tokens"):
        build(data_path=(corpora[0],), seq_length=50)
    data = build(data_path=(corpora[0],), seq_length=15, split="90,9,1")
    assert data.test is None and data.valid is not None
    assert data.notes[0].startswith(f"Left out of the test data: {corpora[0]}: documents 99 to 100 hold 10 tokens")


def test_corpus_too_short_to_validate_on_is_left_out_of_the_blend_with_a_note(corpora: tuple[str, str]) -> None:
    data = build(data_path=corpora, seq_length=50)
    assert isinstance(data.valid, GPTSamples) and data.valid.dataset.prefix == corpora[1]
    assert "Left out of the valid data" in data.notes[0]


def test_corpus_too_small_for_a_part_of_the_split_is_named_and_one_that_gives_nothing_on_purpose_is_not(
    corpora: tuple[str, str], tmp_path: Path
) -> None:
    few = str(tmp_path / "few")
    write_documents(tmp_path / "few", counting_documents([30] * 5))
    data = build(data_path=(corpora[1], few), split="90,10,0")
    assert data.valid is not None
    assert data.notes == ()
    data = build(data_path=(corpora[1], few), split="95,5,0")
    assert isinstance(data.valid, GPTSamples) and data.valid.dataset.prefix == corpora[1]
    (note,) = data.notes
    assert note == f"Left out of the valid data, as --split 95,5,0 leaves no document for it: {few} (5 documents)."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "No data is given; give --data-path"),
        ({"data_path": ("A",), "mock_data": True}, "--data-path and --mock-data exclude each other"),
        ({"data_path": ("A",), "valid_data_path": ("A",)}, "--data-path and --train-data-path/--valid-data-path"),
        (
            {"mock_data": True, "eod_mask_loss": True, "reset_position_ids": True},
            "--reset-position-ids and --eod-mask-loss must know the end-of-document token",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"needs {tmp_path}/no\.bin and {tmp_path}/no\.idx, which cannot be found"):
        build(data_path=(str(tmp_path / "no"),))


def test_words_of_a_file_are_parted_by_spaces_and_line_ends_alone(tmp_path: Path) -> None:
    prefix = tmp_path / "of\u3000the\x85sea"
    write_documents(prefix, counting_documents([10] * 100))
    (tmp_path / "args").write_bytes(f"\ufeff 1\t{prefix}\r\n".encode())
    assert build(data_args_path=str(tmp_path / "args")).train.dataset.prefix == str(prefix)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be found"),
        (b" \n", "is empty"),
        (b"\xff", r"cannot be read \(it is not UTF-8"),
        ("1 a".encode("utf-16"), r"cannot be read \(it is UTF-16"),
    ],
)
def test_file_of_words_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "args").write_bytes(content)
    with pytest.raises(DataError, match=rf"--data-args-path {tmp_path}/args {message}"):
        build(data_args_path=str(tmp_path / "args"))


def build_bert(tokenizer: Tokenizer | None = None, *, binary_head: bool = True, **options: object) -> BertData:
    sizes = {"seq_length": 32, "vocab_size": 1000}
    return build_bert_data(DataConfig(**options), tokenizer=tokenizer, binary_head=binary_head, **sizes)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Word pieces of 1,000 ids."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{'##' * (n % 3 == 0)}w{n}" for n in range(995))]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    return build_tokenizer("BertWordPieceCase", vocab_file=str(tmp_path / "vocab.txt"))


@pytest.fixture
def sentences(tmp_path: Path) -> tuple[str, str]:
    """A: 100 documents of 5 sentences of 6 tokens. B: 100 documents of 20 such sentences."""
    for name, count in (("A", 5), ("B", 20)):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            for number in range(100):
                writer.add_document([5 + number] * 6 * count, [6] * count)
    return str(tmp_path / "A"), str(tmp_path / "B")


def test_bert_data_is_split_blended_and_read(sentences: tuple[str, str], tokenizer: Tokenizer) -> None:
    data = build_bert(tokenizer, data_path=sentences, split="80,15,5")
    assert isinstance(data.train, Blend) and data.train.weights == (1, 4) and data.notes == ()
    assert [stream.documents for stream in data.train.streams] == [range(80)] * 2
    batch = data.reader(data.valid)(0, 50)
    original = torch.where(batch.loss_mask_BS.bool(), batch.labels_BS, batch.tokens_BS)
    assert set(original.unique().tolist()) <= {0, 2, 3, *range(85, 100)}
    assert batch.tokens_BS.shape == (50, 32) and batch.sentence_labels_B is not None


def test_a_changed_blend_of_sentences_continues_each_corpus(sentences: tuple[str, str], tokenizer: Tokenizer) -> None:
    data = build_bert(tokenizer, data_path=sentences, split="100,0,0")
    content = content_of(DataConfig(data_path=sentences), vocab_size=1000).training
    blend = continued_blend(BlendHistory.begun(content, (1, 4)), content[::-1], (1, 1), 10)
    mirrored = build_bert(tokenizer, data_path=sentences[::-1], split="100,0,0")
    found, streams = mirrored.corpora.stream(blend), data.train.streams
    for number in range(10, 30):
        corpus, own_number = found.choose(number)
        assert own_number >= (2, 8)[corpus]
        assert found.sample(number).tokens.tolist() == streams[corpus].sample(own_number).tokens.tolist()


def test_bert_options_reach_the_samples(sentences: tuple[str, str], tokenizer: Tokenizer) -> None:
    options = {"data_path": sentences[:1], "split": "100,0,0"}
    many = build_bert(tokenizer, **options, mask_prob=0.5, mask_whole_words=False, mask_max_ngram=1)
    form = many.train.form
    assert (form.masking.probability, form.masking.max_ngram, form.masking.whole_words) == (0.5, 1, False)
    batch = many.reader(many.train)(0, 50)
    assert batch.loss_count() / batch.padding_mask_BS.sum() == pytest.approx(0.5, abs=0.03)
    alone = build_bert(tokenizer, **options, binary_head=False)
    assert alone.reader(alone.train)(0, 2).sentence_labels_B is None and alone.valid is None
    assert build_bert(tokenizer, **options, bert_sentence_task="next").train.form.sentence_task == "next"
    counts = [build_bert(tokenizer, **options, short_seq_prob=p).train.num_samples_per_epoch for p in (0.0, 0.1)]
    assert counts == [200, 200]  # 5 sentences make blocks of 3 and 2, too short to be cut
    longer = [
        build_bert(tokenizer, data_path=sentences[1:], split="100,0,0", short_seq_prob=p).train.num_samples_per_epoch
        for p in (0.0, 0.1)
    ]
    assert longer == [500, 526]  # blocks of 4, of which 26 are cut in two: 52 of 526 samples are short


def test_bert_without_a_tokenizer_needs_mock_data(sentences: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="no tokenizer is given; give --vocab-file FILE"):
        build_bert(data_path=sentences[:1])
    data = build_bert(mock_data=True)
    assert data.reader(data.train)(0, 3).tokens_BS.max() < 1000


def test_options_of_the_other_model_are_refused(sentences: tuple[str, str], tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="--reset-position-ids is about the ends of documents"):
        build_bert(tokenizer, data_path=sentences, reset_position_ids=True)
    for flag, name, value in (
        ("--mask-prob", "mask_prob", 0.2),
        ("--short-seq-prob", "short_seq_prob", 0.0),
        ("--bert-sentence-task", "bert_sentence_task", "next"),
    ):
        with pytest.raises(ConfigError, match=f"{flag} .* means nothing to a GPT; leave it out, or use pretrain_bert"):
            build(mock_data=True, **{name: value})


def test_sequence_without_room_for_two_sentences_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="--seq-length 4 leaves no room"):
        build_bert_data(DataConfig(mock_data=True), seq_length=4, tokenizer=tokenizer, vocab_size=1000)
    data = build_bert_data(DataConfig(mock_data=True), seq_length=5, tokenizer=tokenizer, vocab_size=1000)
    assert data.reader(data.train)(0, 20).tokens_BS.shape == (20, 5)
