"""Tokenizers: published ids, agreement with transformers, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.data.tokenizer import TOKENIZER_TYPES, ByteTokenizer, NullTokenizer, Tokenizer, build_tokenizer
from megatron3d.data.train_bpe import train_byte_level_bpe, write_tokenizer
from megatron3d.data.train_word_pieces import SPECIAL_PIECES, train_word_pieces, write_word_pieces
from megatron3d.errors import ConfigError, DataError
from tests.data.corpora import SHARED, needs_shared

GPT2 = {
    "vocab_file": str(SHARED / "tokenizers/gpt2/vocab.json"),
    "merge_file": str(SHARED / "tokenizers/gpt2/merges.txt"),
}
BERT = str(SHARED / "tokenizers/bert-base-uncased/vocab.txt")
SENTENCEPIECE = str(SHARED / "tokenizers/sentencepiece/test_model.model")
TEXTS = [
    "Hello world",
    "  don't\n\nstop 1234!",
    "Ĥéllò — wörld 日本語 🙂",
    "A <|endoftext|> B",
    "a" * 300,
    "\t\x00\u200d",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small byte-level BPE."""
    root = tmp_path_factory.mktemp("bpe")
    texts = [f"the cat number {n} sat on the mat and the other cat number {n * 7} sat on the hat" for n in range(200)]
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_tokenizer(train_byte_level_bpe([root / "corpus.jsonl"], "text", vocab_size=300), root / "tok")
    return root / "tok"


@needs_shared
def test_gpt2_gives_the_published_ids() -> None:
    tokenizer = build_tokenizer("GPT2BPETokenizer", **GPT2)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eod) == (50257, 50256)
    assert tokenizer.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"


@needs_shared
def test_gpt2_equals_transformers_and_comes_back() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast(vocab=GPT2["vocab_file"], merges=GPT2["merge_file"])
    tokenizer = build_tokenizer("GPT2BPETokenizer", **GPT2)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if "<|endoftext|>" not in text:
            assert ids == theirs(text)["input_ids"]
        else:
            assert tokenizer.eod not in ids, "a text cannot spell the end of a document"


@needs_shared
def test_bert_gives_the_published_ids() -> None:
    tokenizer = build_tokenizer("BertWordPieceLowerCase", vocab_file=BERT)
    assert [tokenizer.cls, *tokenizer.encode("Hello world"), tokenizer.sep] == [101, 7592, 2088, 102]
    assert (tokenizer.vocab_size, tokenizer.pad, tokenizer.mask, tokenizer.eod) == (30522, 0, 103, None)
    assert tokenizer.decode(tokenizer.encode("Hello, embeddings")) == "hello, embeddings"


@needs_shared
def test_cased_bert_keeps_case() -> None:
    """The vocabulary has lower case alone, so a capital must end as [UNK], id 100."""
    tokenizer = build_tokenizer("BertWordPieceCase", vocab_file=BERT)
    assert tokenizer.encode("Hello world") == [100, 2088]


@needs_shared
@pytest.mark.parametrize("kind", ["BertWordPieceLowerCase", "BertWordPieceCase"])
def test_bert_equals_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizerFast(vocab=BERT, do_lower_case=kind == "BertWordPieceLowerCase")
    ours = build_tokenizer(kind, vocab_file=BERT)
    for text in TEXTS[:3]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@needs_shared
@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_cuts_as_published(kind: str) -> None:
    tokenizer = build_tokenizer(kind, tokenizer_model=SENTENCEPIECE)
    assert tokenizer.pieces("Hello world") == ["▁He", "ll", "o", "▁world"]
    assert tokenizer.decode(tokenizer.encode("Hello world")) == "Hello world"
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (1000, 1, 2, None)


def test_trained_files_give_the_same_ids_by_both_kinds_and_transformers(trained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    as_gpt2 = build_tokenizer(
        "GPT2BPETokenizer", vocab_file=str(trained / "vocab.json"), merge_file=str(trained / "merges.txt")
    )
    directory = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(trained))
    file = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(trained / "tokenizer.json"))
    assert directory.eod == file.eod == as_gpt2.eod == 0
    assert directory.vocab_size == as_gpt2.vocab_size == 300
    theirs = transformers.AutoTokenizer.from_pretrained(trained)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert directory.encode(text) == file.encode(text) == ids
        assert directory.decode(ids) == text
        if "<|endoftext|>" not in text:
            assert as_gpt2.encode(text) == ids


def test_batch_gives_what_single_texts_give(trained: Path) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(trained))
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_training_twice_gives_the_same_files(trained: Path, tmp_path: Path) -> None:
    again = train_byte_level_bpe([trained.parent / "corpus.jsonl"], "text", vocab_size=300)
    for path in write_tokenizer(again, tmp_path / "again"):
        assert path.read_bytes() == (trained / path.name).read_bytes()


def test_vocabulary_too_small_for_the_bytes_is_refused(trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"--vocab-size 256 is too small: 256 bytes and <\|endoftext\|> take 257"):
        train_byte_level_bpe([trained.parent / "corpus.jsonl"], "text", vocab_size=256)


@pytest.mark.parametrize(("lower_case", "kind"), [(True, "BertWordPieceLowerCase"), (False, "BertWordPieceCase")])
def test_trained_word_pieces_are_read_as_they_were_trained(tmp_path: Path, lower_case: bool, kind: str) -> None:
    texts = [f"The cat number {n} sat on the mat; the Ñandú did not sit. " * 3 for n in range(50)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folders = [tmp_path / "once", tmp_path / "again"]
    for folder in folders:
        trained = train_word_pieces([tmp_path / "corpus.jsonl"], "text", vocab_size=90, lower_case=lower_case)
        written = write_word_pieces(trained, folder, lower_case=lower_case)
    assert all((folders[0] / path.name).read_bytes() == path.read_bytes() for path in written)
    pieces = (folders[0] / "vocab.txt").read_text().split()
    assert pieces[:5] == list(SPECIAL_PIECES) and len(pieces) == len(set(pieces)) <= 90
    assert any(len(piece) > 4 for piece in pieces[5:]) and ("T" in pieces) != lower_case
    tokenizer = build_tokenizer(kind, vocab_file=str(folders[0] / "vocab.txt"))
    for text in (texts[3], "the mats", "Cat 7"):
        assert tokenizer.encode(text) == trained.encode(text).ids
    assert trained.token_to_id("[UNK]") not in tokenizer.encode(texts[3])


def test_a_vocabulary_without_room_for_the_special_pieces_is_refused(trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"--vocab-size 5 is too small: \[PAD\], .* take 5"):
        train_word_pieces([trained.parent / "corpus.jsonl"], "text", vocab_size=5)


@given(st.text())
def test_bytes_come_back(text: str) -> None:
    try:
        expected = list(text.encode("utf-8"))
    except UnicodeEncodeError:
        return
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode([*expected, tokenizer.eod]) == text
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


def test_null_tokenizer_reads_numbers_and_its_end_is_one_more() -> None:
    tokenizer = NullTokenizer(100)
    assert tokenizer.encode("3 99  100\n") == [3, 99, 100]
    assert tokenizer.decode([3, 99]) == "3 99"
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    theirs = pytest.importorskip("megatron.core.tokenizers.text.libraries.null_tokenizer").NullTokenizer(100)
    assert (theirs.vocab_size, theirs.eod, theirs.text_to_ids("3 99")) == (101, 100, [3, 99])


@pytest.mark.parametrize("text", ["3 x", "101", "-1", "²"])
def test_null_tokenizer_refuses_what_is_no_id(text: str) -> None:
    with pytest.raises(DataError, match="reads ids from 0 to 100, not"):
        NullTokenizer(100).encode(text)


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("GPT2BPETokenizer", "--vocab-file"),
        ("BertWordPieceCase", "--vocab-file"),
        ("HuggingFaceTokenizer", "--tokenizer-model"),
        ("Llama2Tokenizer", "--tokenizer-model"),
        ("NullTokenizer", "--vocab-size"),
    ],
)
def test_missing_option_is_named(kind: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--tokenizer-type {kind} needs {flag}"):
        build_tokenizer(kind)


def test_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(ConfigError, match="WordTokenizer is not known; the kinds are " + ", ".join(TOKENIZER_TYPES)):
        build_tokenizer("WordTokenizer")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"--tokenizer-model {tmp_path}/no cannot be found; nothing is downloaded"):
        build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "no"))


def test_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path} describes no tokenizer: it has none of tokenizer\.json"):
        build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))


def broken(kind: str, path: Path) -> Tokenizer:
    options = dict.fromkeys(("vocab_file", "merge_file", "tokenizer_model"), str(path))
    return build_tokenizer(kind, **options)


@pytest.mark.parametrize(
    "kind", ["GPT2BPETokenizer", "BertWordPieceLowerCase", "HuggingFaceTokenizer", "SentencePieceTokenizer"]
)
def test_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("this is no tokenizer")
    with pytest.raises(DataError, match=f"{tmp_path}/file"):
        broken(kind, tmp_path / "file")
