"""Arrays of ids equal the lists they replace, and a faster library is used only where its ids are the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from megatron3d.data import gigatoken_tokenizer
from megatron3d.data.gigatoken_tokenizer import GigatokenTokenizer
from megatron3d.data.prepare import records
from megatron3d.data.prepare.corpus import read_batches
from megatron3d.data.prepare.encode import EncodeRequest, encode_batch
from megatron3d.data.prepare.encoder import Encoder, choose_encoder, first_other_ids, hostile_texts
from megatron3d.data.prepare.records import RawBatch, parse_documents
from megatron3d.data.prepare.spans import Position, whole_files
from megatron3d.data.tiktoken_file import PATTERNS, byte_pair_library
from megatron3d.data.tokenizer import TokenizerSpec
from megatron3d.data.tokenizer_interface import LibraryTokenizer, SpecialIds, Tokenizer
from megatron3d.errors import ConfigError, DataError
from tests.data.corpora import SHARED, needs_shared
from tools.preprocess_data import main

TEXTS = ["Hello world", "", "  two\n\nlines ", "don't 1234", "über 日本 🙂", "x" * 300]
PIECES = [bytes([value]) for value in range(256)] + [b"th", b"the", b" the", b"in", b"ing", b"  ", b"lo"]
FILES = SHARED / "tokenizers"


def byte_pairs(pattern: str = PATTERNS["v2"]) -> Library:
    return byte_pair_library(PIECES, first_id=0, pattern=pattern)


def in_python_lists(request: EncodeRequest, batch: RawBatch) -> tuple[list[int], list[int], list[int]]:
    """Tokens, lengths and sizes as they were found before there were arrays: one text after the other."""
    tokenizer = request.tokenizer.build()
    tokens, lengths, sizes = [], [], []
    for record in batch.records:
        assert isinstance(record, bytes)
        value = json.loads(record)["text"]
        rows = [tokenizer.encode(text) for text in (value if isinstance(value, list) else [value])]
        rows = [[*tokenizer.prefix, *row, *tokenizer.suffix] if request.special_tokens else row for row in rows if row]
        if request.append_eod and rows:
            rows[-1] = [*rows[-1], tokenizer.eod]
        tokens += [token for row in rows for token in row]
        lengths += [len(row) for row in rows]
        sizes.append(len(rows))
    return tokens, lengths, sizes


@pytest.fixture
def framed(tmp_path: Path) -> TokenizerSpec:
    """A tokenizer whose description puts two tokens before a text and one behind it."""
    library = byte_pairs()
    library.add_special_tokens(["<s>", "<t>", "</s>", "<|endoftext|>"])
    first = len(PIECES)
    names = [("<s>", first), ("<t>", first + 1), ("</s>", first + 2)]
    library.post_processor = processors.TemplateProcessing(single="<s> <t> $A </s>", special_tokens=names)
    (tmp_path / "tok").mkdir()
    library.save(str(tmp_path / "tok" / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>"}
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(settings))
    return TokenizerSpec("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tok"))


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("special_tokens", [False, True])
def test_a_batch_in_arrays_is_the_batch_text_by_text(
    tmp_path: Path, framed: TokenizerSpec, append_eod: bool, special_tokens: bool
) -> None:
    values = [*TEXTS, ["a", "", "the thing"], [], ["", ""], *TEXTS[::-1], ""]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in values))
    batch = next(read_batches(whole_files([tmp_path / "c.jsonl"]), ["text"]))
    request = EncodeRequest(framed, ("text",), append_eod, special_tokens=special_tokens)
    (found,) = encode_batch(request, batch).keys
    tokens, lengths, sizes = in_python_lists(request, batch)
    assert found.tokens.tolist() == tokens and found.sequence_lengths.tolist() == lengths
    assert found.sequences_per_document.tolist() == sizes
    assert [array.dtype for array in (found.tokens, found.sequence_lengths)] == [np.dtype("<u2"), np.int64]


@pytest.mark.parametrize("kind", ["ByteTokenizer", "NullTokenizer"])
def test_arrays_of_kinds_without_files_are_their_lists(kind: str) -> None:
    check_arrays(TokenizerSpec(kind, vocab_size=70_000), ["1 2", "", "69999"])


@needs_shared
@pytest.mark.parametrize(
    "spec",
    [
        TokenizerSpec("GPT2BPETokenizer", vocab_file=f"{FILES}/gpt2/vocab.json", merge_file=f"{FILES}/gpt2/merges.txt"),
        TokenizerSpec("BertWordPieceCase", vocab_file=f"{FILES}/bert-base-uncased/vocab.txt"),
        TokenizerSpec("Llama2Tokenizer", tokenizer_model=f"{FILES}/sentencepiece/test_model.model"),
    ],
    ids=lambda spec: spec.tokenizer_type,
)
def test_arrays_of_kinds_with_files_are_their_lists(spec: TokenizerSpec) -> None:
    check_arrays(spec, TEXTS)


def check_arrays(spec: TokenizerSpec, texts: list[str]) -> None:
    tokenizer = spec.build()
    ids, lengths = tokenizer.encode_arrays(texts, np.dtype("<i4"))
    rows = [tokenizer.encode(text) for text in texts]
    assert ids.tolist() == [id for row in rows for id in row] and ids.dtype == "<i4"
    assert lengths.tolist() == [len(row) for row in rows]
    assert [len(array) for array in tokenizer.encode_arrays([], np.dtype("<i4"))] == [0, 0]


class Almost(LibraryTokenizer):
    """Gives the ids of its library except for one character."""

    def encode_arrays(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = super().encode_arrays(texts, dtype)
        return np.where(ids == PIECES.index(b"Z"), 0, ids), lengths


def test_the_first_other_ids_is_named_by_its_text_and_both_ids() -> None:
    right, almost = LibraryTokenizer(byte_pairs(), SpecialIds()), Almost(byte_pairs(), SpecialIds())
    assert first_other_ids(right, almost, ["abc", "", "the thing"]) is None
    difference = first_other_ids(right, almost, ["abc", "loZa", "Z"])
    assert difference is not None and (difference.text, difference.expected[0]) == ("loZa", 90)
    assert "for 'loZa' gigatoken gives the ids 0, 97 where the tokenizer's own are 90, 97" in (difference.sentence)
    assert first_other_ids(right, almost, list(hostile_texts(()))) is not None


def test_without_the_library_one_sentence_says_so_and_its_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer, notes = LibraryTokenizer(byte_pairs(), SpecialIds()), []
    assert choose_encoder(Encoder.AUTO, tokenizer, TEXTS, notes.append) is Encoder.REFERENCE
    assert (
        len(notes) == 1
        and "texts are encoded by tokenizers, since gigatoken is not installed; run: " in notes[0]
        and "[gigatoken]" in notes[0]
    )
    with pytest.raises(ConfigError, match="--encoder gigatoken cannot be used: gigatoken is not installed"):
        choose_encoder(Encoder.GIGATOKEN, tokenizer, TEXTS, notes.append)
    assert choose_encoder(Encoder.REFERENCE, tokenizer, TEXTS, notes.append) is Encoder.REFERENCE and len(notes) == 1


class Remembering:
    """Stands for the library's tokenizer: the ids are the bytes, and it keeps every text that it has met."""

    built: ClassVar[list[Remembering]] = []

    def __init__(self) -> None:
        self.met: list[str] = []
        self.built.append(self)

    @classmethod
    def from_json(cls, description: str) -> Remembering:
        assert json.loads(description)["model"]["type"] == "BPE"
        return cls()

    def encode(self, text: str) -> np.ndarray:
        self.met.append(text)
        return np.frombuffer(text.encode(), np.uint8)


def test_what_the_library_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", SimpleNamespace(Tokenizer=Remembering))
    monkeypatch.setattr(Remembering, "built", [])
    monkeypatch.setattr(gigatoken_tokenizer, "_RENEWED_AFTER", 40)
    tokenizer = GigatokenTokenizer(LibraryTokenizer(byte_pairs(), SpecialIds()))
    texts = [f"text number {number}" for number in range(10, 30)]
    ids, lengths = tokenizer.encode_arrays(texts, np.dtype("<u2"))
    assert bytes(ids.astype(np.uint8)) == "".join(texts).encode() and lengths.tolist() == [14] * 20
    assert [len(one.met) for one in Remembering.built] == [3] * 6 + [2]


# --- With the library ------------------------------------------------------------------------------------------------


@pytest.fixture
def gigatoken() -> Callable[[Library], tuple[Encoder, str]]:
    """Choose an encoder for a tokenizer of the `tokenizers` library; the choice and the line about it."""
    pytest.importorskip("gigatoken", reason="needs gigatoken")

    def choose(library: Library) -> tuple[Encoder, str]:
        notes: list[str] = []
        chosen = choose_encoder(Encoder.AUTO, LibraryTokenizer(library, SpecialIds()), TEXTS, notes.append)
        return chosen, notes[0]

    return choose


def test_kinds_whose_ids_gigatoken_gives(gigatoken: Callable[[Library], tuple[Encoder, str]]) -> None:
    gpt2 = byte_pairs()
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.add_special_tokens(["<|endoftext|>"])
    spaced = byte_pairs()
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for library in (byte_pairs(), gpt2, spaced):
        chosen, line = gigatoken(library)
        assert chosen is Encoder.GIGATOKEN and "texts are encoded by gigatoken, whose ids are the same" in line
        tokenizer = LibraryTokenizer(library, SpecialIds(eod=1))
        faster = GigatokenTokenizer(tokenizer)
        texts = [*TEXTS, "<|endoftext|> the"]
        for ours, theirs in zip(faster.encode_arrays(texts, np.dtype("<u2")), encoded(tokenizer, texts), strict=True):
            assert ours.tolist() == theirs.tolist() and ours.dtype == theirs.dtype
        assert faster.eod == 1 and faster.decode(faster.encode("the thing")) == tokenizer.decode(
            tokenizer.encode("the thing")
        )


def encoded(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return tokenizer.encode_arrays(texts, np.dtype("<u2"))


def test_kinds_that_gigatoken_lacks_or_cuts_otherwise_are_left_to_their_own_library(
    gigatoken: Callable[[Library], tuple[Encoder, str]],
) -> None:
    pieces = Library(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    composed = byte_pairs()
    composed.normalizer = normalizers.NFC()
    for library, reason in (
        (pieces, 'this kind of tokenizer: Unsupported model type "WordPiece"'),
        (byte_pairs(PATTERNS["v1"]), "this kind of tokenizer: Unknown pre_tokenizer Split"),
        (composed, "gigatoken gives the ids"),
    ):
        chosen, line = gigatoken(library)
        assert chosen is Encoder.REFERENCE and reason in line and line.count("\n") == 0
        with pytest.raises(DataError, match=r"--encoder gigatoken cannot be used: .* use --encoder auto"):
            choose_encoder(Encoder.GIGATOKEN, LibraryTokenizer(library, SpecialIds()), TEXTS, lambda line: None)


def test_output_is_the_same_by_each_encoder_and_number_of_workers(tmp_path: Path, framed: TokenizerSpec) -> None:
    pytest.importorskip("gigatoken", reason="needs gigatoken")
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": f"{text} {n}" * (n % 9)}) + "\n" for n in range(400) for text in TEXTS)
    )
    written = set()
    for encoder, workers in (("reference", 1), ("gigatoken", 1), ("gigatoken", 2)):
        words = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {framed.tokenizer_model} --append-eod"
        words += f" --encoder {encoder} --workers {workers} --input {tmp_path}/c.jsonl --output-prefix {tmp_path}/out"
        assert main(words.split()) == 0
        written.add(tuple((tmp_path / f"out_text_document.{ending}").read_bytes() for ending in ("bin", "idx")))
    assert len(written) == 1


def test_records_read_by_orjson_are_those_of_the_standard_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("orjson", reason="needs orjson")
    number = b"1" * 5000
    lines = [
        *(b'{"text": "a\\u00e9\\ud83d\\ude42\\/\\u0000"}', '{"text": "ü"}'.encode(), b' {"text": ["a", "b"]}\r\n'),
        *(b'{"text": "a", "n": [NaN, 1e999, -0, 18446744073709551616]}', b'{"text": "a", "n": ' + number + b"}"),
        *(
            b'{"text": "\\ud800"}',
            b'{"text": "\xed\xa0\x80"}',
            b'{"text": "\xff"}',
            b'{"text": "\x01"}',
            b'{"text": 1}',
        ),
        *(b'{"text": 1, "text": "b"}', b'{"text": "a"} x', b'{"text": "a", "n": 01}', b"[1]", b"null", b"", b"{"),
        b'{"text": "a", "n": ' + b"[" * 300 + b"]" * 300 + b"}",
        *(b"[" * 5000 + b"]" * 5000, b'{"\\ud800": 1, "text": "a"}', b'{"text": "a", "n": "' + b"[" * 300 + b'"}'),
    ]
    batch = RawBatch("c.jsonl", list(range(len(lines))), list(lines), 0, Position(0, 0))
    found = parse_documents(batch, ["text"])
    assert len(found.documents[0]) == 7 and len(found.rejects) == len(lines) - 7
    monkeypatch.setattr(records, "_ORJSON", None)
    assert parse_documents(batch, ["text"]) == found
