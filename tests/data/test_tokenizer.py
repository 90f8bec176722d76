"""Tokenizers: published ids, agreement with transformers, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron3d.data.prepare.train_bpe import train_byte_level_bpe, write_tokenizer
from megatron3d.data.prepare.train_word_pieces import SPECIAL_PIECES, train_word_pieces, write_word_pieces
from megatron3d.data.tokenizer import TOKENIZER_TYPES, ByteTokenizer, NullTokenizer, Tokenizer, build_tokenizer
from megatron3d.errors import ConfigError, DataError, Megatron3dError
from tests.data.corpora import SHARED, needs_shared
from tests.files.mutations import DEEP, mutated_bytes

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


PIECES = [*SPECIAL_PIECES, "a", "##\u2028", "b\x85c", "\x0c", "spaced ", "##d\t", "last"]


def test_a_vocabulary_has_as_many_tokens_as_lines_whatever_they_hold(tmp_path: Path) -> None:
    """Ids are those of transformers, which cuts lines at line feeds alone and trims their ends too."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in PIECES), encoding="utf-8", newline="\n")
    ours, theirs = build_tokenizer("BertWordPieceCase", vocab_file=str(path)), transformers.BertTokenizer(str(path))
    assert ours.vocab_size == len(PIECES) == theirs.vocab_size
    assert ours.encode("last a") == [len(PIECES) - 1, len(SPECIAL_PIECES)]
    for text in ("last a", "a spaced last", "ad lastd spacedd"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode("spaced") == [PIECES.index("spaced ")]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_vocabularies_with_byte_order_marks_and_windows_line_ends_give_the_same_ids(
    trained: Path, tmp_path: Path, line_end: str
) -> None:
    for name in ("vocab.json", "merges.txt"):
        text = (trained / name).read_text(encoding="utf-8").replace("\n", line_end)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf" + line_end.join([*SPECIAL_PIECES, "cat", "sat"]).encode())
    plain = build_tokenizer("GPT2BPETokenizer", vocab_file=f"{trained}/vocab.json", merge_file=f"{trained}/merges.txt")
    marked = build_tokenizer(
        "GPT2BPETokenizer", vocab_file=f"{tmp_path}/vocab.json", merge_file=f"{tmp_path}/merges.txt"
    )
    assert marked.encode("the cat sat") == plain.encode("the cat sat") and marked.vocab_size == plain.vocab_size
    pieces = build_tokenizer("BertWordPieceCase", vocab_file=f"{tmp_path}/vocab.txt")
    assert pieces.encode("cat sat") == [len(SPECIAL_PIECES), len(SPECIAL_PIECES) + 1]


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (b'{"a": "\xff"}', b"", r"vocab\.json cannot be read \(it is not UTF-8: byte 7 is 0xff"),
        ('{"a": 0}'.encode("utf-16"), b"", r"vocab\.json cannot be read \(it is UTF-16"),
        (b"[1]", b"", r"vocab\.json cannot be read \(it holds a list"),
        (DEEP.encode(), b"", r"vocab\.json cannot be read \(it is nested too deep"),
        (b'{"a": "b"}', b"", r"vocab\.json is no vocab\.json: the id of 'a' is 'b'"),
        (b'{"a": -1}', b"", r"the id of 'a' is -1"),
        (b'{"a": 1e3}', b"", r"the id of 'a' is 1000\.0"),
        (b'{"a": 99999999999}', b"", r"the id of 'a' is 99999999999"),
        (b'{"a": 0, "b": 1}', b"a b c\n", r"merges\.txt, line 1 is 'a b c'; it must hold two pieces"),
        (b'{"a": 0, "b": 1}', b"#version: 0.2\na\n", r"merges\.txt, line 2 is 'a'"),
        (b'{"a": 0, "b": 1}', b"a b\n", "line 1 merges 'a' and 'b', but 'ab' is no token"),
        (b'{"a": 0, "b": 1}', b"a \xff\n", r"--merge-file .*merges\.txt cannot be read \(it is not UTF-8"),
    ],
)
def test_vocabularies_that_are_none_are_refused_with_the_option_and_the_reason(
    tmp_path: Path, vocab: bytes, merges: bytes, message: str
) -> None:
    (tmp_path / "vocab.json").write_bytes(vocab)
    (tmp_path / "merges.txt").write_bytes(merges)
    files = {"vocab_file": f"{tmp_path}/vocab.json", "merge_file": f"{tmp_path}/merges.txt"}
    with pytest.raises(DataError, match=message):
        build_tokenizer("GPT2BPETokenizer", **files)


def test_a_word_piece_vocabulary_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes("\n".join([*SPECIAL_PIECES, "für"]).encode("latin-1"))
    with pytest.raises(DataError, match=r"--vocab-file .*vocab\.txt cannot be read \(it is not UTF-8: byte 32 is 0xfc"):
        build_tokenizer("BertWordPieceCase", vocab_file=f"{tmp_path}/vocab.txt")


def small_documents() -> dict[str, Any]:
    """A tokenizer.json of each kind of model, small enough to be changed everywhere."""
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.add_special_tokens(["<|endoftext|>"])
    pieces = {"[UNK]": 0, "[CLS]": 1, "a": 2, "##b": 3}
    word_pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    word_pieces.normalizer = tokenizers.normalizers.BertNormalizer()
    word_pieces.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0), ("b", -2.0)], 0))
    made = {"byte-level BPE": byte_level, "word pieces": word_pieces, "unigram": unigram}
    return {name: json.loads(one.to_str()) for name, one in made.items()}


def test_a_panic_of_the_library_is_a_sentence(tmp_path: Path) -> None:
    """A merge whose result is no token: the library's Rust code panics, which is no `Exception` in Python."""
    document = small_documents()["byte-level BPE"]
    del document["model"]["vocab"]["ab"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(BaseException) as panic:
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert not isinstance(panic.value, Exception), "the library does better now: as_data_error needs no panics"
    with pytest.raises(DataError, match=r"cannot be read as a tokenizer\.json"):
        build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))


_NAMES = {"eos_token": "<|endoftext|>", "cls_token": {"content": "[CLS]"}, "model_max_length": 7}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_description_of_a_tokenizer_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    document = small_documents()[data.draw(st.sampled_from([*small_documents()]))]
    names = data.draw(st.booleans())
    text = json.dumps(document).encode() if names else data.draw(mutated_bytes(document))
    (tmp_path / "tokenizer.json").write_bytes(text)
    (tmp_path / "tokenizer_config.json").write_bytes(
        data.draw(mutated_bytes(_NAMES)) if names else json.dumps(_NAMES).encode()
    )
    try:
        tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
        tokenizer.decode(tokenizer.encode("ab? ba"))
    except Megatron3dError:
        return


def test_numbers_of_any_length_are_no_ids() -> None:
    with pytest.raises(DataError, match="reads ids from 0 to 10, not '999"):
        NullTokenizer(10).encode("1 " + "9" * 5000)
    assert NullTokenizer(10).encode("0" * 5000 + "7 00") == [7, 0]
