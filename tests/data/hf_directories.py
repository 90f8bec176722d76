"""Hugging Face directories with a tokenizer of each kind, from vocabularies that are trained here or published ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = (
    "Hello world, in 1898 there were 1898 people",
    "  don't\n\nstop   1234! <|im_start|>there<|endoftext|>",
    "für Für Ĥéllò naïve ﬁne — wörld",
    "日本語の文章と中文字符,한국어 조각",
    "Привет, мир! κόσμος είναι μεγάλος",
    "السلام عليكم नमस्ते दुनिया สวัสดีชาวโลก",
    "a [MASK] b [SEP] <s> c </s> [PAD]",
    "e\u0301 \u2028 \x85 \x0c \u200d \ufeff 🙂🏽 \x00\t",
    "",
    " ",
)
END, START = "<|endoftext|>", "<|im_start|>"
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Vocabularies:
    """Where the vocabularies lie: vocab.json and merges.txt, a vocab.txt, and a sentencepiece model."""

    gpt2: Path
    bert: Path
    sentencepiece: Path


def trained_vocabularies(root: Path) -> Vocabularies:
    """Small vocabularies of the texts above."""
    (root / "gpt2").mkdir(parents=True)
    byte_level().model.save(str(root / "gpt2"))
    pieces = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.train_from_iterator(
        [*TEXTS, *(text.lower() for text in TEXTS)] * 3,
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(BERT_TOKENS), show_progress=False),
    )
    (root / "bert").mkdir()
    pieces.model.save(str(root / "bert"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if text.strip() and "\x00" not in text] * 5),
        model_prefix=str(root / "spm"),
        model_type="bpe",
        vocab_size=440,
        byte_fallback=True,
        user_defined_symbols=[START],
        minloglevel=2,
    )
    return Vocabularies(root / "gpt2", root / "bert" / "vocab.txt", root / "spm.model")


def byte_level(*, digits: bool = False, normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    """A byte-level BPE of the texts; with `digits` it is used with another pre-tokenizer than it was trained with."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator([*TEXTS * 3, *["1898 people"] * 9], trainer)
    if digits:
        each = pre_tokenizers.Digits(individual_digits=True)
        library.pre_tokenizer = pre_tokenizers.Sequence([each, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if normalizer is not None:
        library.normalizer = normalizer
    return library


def framed() -> tokenizers.Tokenizer:
    """A tokenizer that puts a token before and one behind a text, and would cut and pad texts if it were let."""
    library = byte_level()
    library.post_processor = processors.TemplateProcessing(
        single=f"{END} $A {START}", special_tokens=[(END, 0), (START, 1)]
    )
    library.enable_truncation(4)
    library.enable_padding(length=6, pad_token=END, pad_id=0)
    return library


def word_pieces(vocabulary: Path, **values: Any) -> tokenizers.Tokenizer:
    """What BertTokenizer saves as tokenizer.json, with these values of its normalizer."""
    library = tokenizers.Tokenizer(models.WordPiece.from_file(str(vocabulary), unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(**values)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(list(BERT_TOKENS))
    cls, sep = (("[CLS]", library.token_to_id("[CLS]")), ("[SEP]", library.token_to_id("[SEP]")))
    library.post_processor = processors.BertProcessing(sep, cls)
    return library


def with_added_tokens() -> tokenizers.Tokenizer:
    """A tokenizer.json with tokens beyond its vocabulary that are found in a text in several ways."""
    library = byte_level(digits=True)
    library.add_tokens([AddedToken("wörld", normalized=False), AddedToken("people", single_word=True)])
    library.add_special_tokens([AddedToken("there", lstrip=True, rstrip=True, normalized=False)])
    return library


_AS_SAVED = {"__type": "AddedToken", "content": "c", "lstrip": True, "normalized": False}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
# Kind -> the model beside it, what makes its tokenizer.json (None: it has none), whether the vocabulary lies there too,
# and tokenizer_config.json (None: it has none).
KINDS: Mapping[str, tuple[str, Callable[[Vocabularies], tokenizers.Tokenizer] | None, bool, dict[str, Any] | None]] = {
    "json alone": ("llama", lambda v: byte_level(digits=True), False, None),
    "json of a normalizer": ("llama", lambda v: byte_level(normalizer=normalizers.NFKC()), False, GENERIC),
    "json with vocab and merges": ("llama", lambda v: byte_level(digits=True), True, GENERIC),
    "json with added tokens": ("llama", lambda v: with_added_tokens(), True, GENERIC),
    "json and more tokens beside it": (
        *("llama", lambda v: byte_level(), False),
        GENERIC | {"pad_token": "<pad>", "additional_special_tokens": ["[MASK]", _AS_SAVED]},
    ),
    "json that frames, cuts and pads": (
        "llama",
        lambda v: framed(),
        False,
        GENERIC | {"add_bos_token": False, "pad_token": END},
    ),
    "vocab and merges": ("gpt2", None, True, None),
    "vocab and merges with a space and a begin": (
        *("gpt2", None, True),
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "add_bos_token": True},
    ),
    "vocab and merges with added tokens": ("gpt2", None, True, {"tokenizer_class": "GPT2TokenizerFast"}),
    "sentencepiece": ("llama", None, True, {"tokenizer_class": "LlamaTokenizer"}),
    "sentencepiece of old": (
        *("llama", None, True),
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_bos_token": True, "add_eos_token": True},
    ),
    "sentencepiece without a space": (
        *("llama", None, True),
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    ),
    "sentencepiece run by its own library": (
        *("gpt2", None, True),
        {"tokenizer_class": "BertGenerationTokenizer", "pad_token": None, "sep_token": None},
    ),
    "word pieces": ("bert", None, True, None),
    "word pieces with accents": ("bert", None, True, {"do_lower_case": True, "strip_accents": False}),
    "word pieces cased": ("bert", None, True, {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False}),
    "word pieces cased without accents": ("bert", None, True, {"do_lower_case": False, "strip_accents": True}),
    "word pieces of whole Chinese": ("bert", None, True, {"tokenize_chinese_chars": False}),
    "json of word pieces with accents": (
        *("bert", lambda v: word_pieces(v.bert, lowercase=True, strip_accents=False), True),
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": False},
    ),
    "json of word pieces, settings say otherwise": (
        *("bert", lambda v: word_pieces(v.bert, lowercase=True), False),
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False},
    ),
}


def make(kind: str, directory: Path, vocabularies: Vocabularies) -> Path:
    """Write the directory of a kind: config.json and the tokenizer's files; returns it."""
    model_type, library_of, has_vocabulary, config = KINDS[kind]
    directory.mkdir(parents=True)
    _write(directory / "config.json", {"model_type": model_type, "eos_token_id": None})
    if config is not None:
        _write(directory / "tokenizer_config.json", config)
    if library_of is not None:
        library_of(vocabularies).save(str(directory / "tokenizer.json"))
    if has_vocabulary:
        for source, name in _vocabulary_files(kind, model_type, vocabularies):
            shutil.copy(source, directory / name)
    if kind == "vocab and merges with added tokens":
        number = len(json.loads((directory / "vocab.json").read_text()))
        added = {START: number, "<|pad|>": number + 1}
        if START in json.loads((directory / "vocab.json").read_text()):
            added = {"qqq": number, "<|pad|>": number + 1}
        _write(directory / "added_tokens.json", added)
        _write(directory / "special_tokens_map.json", {"pad_token": "<|pad|>"})
    return directory


def _vocabulary_files(kind: str, model_type: str, vocabularies: Vocabularies) -> Iterator[tuple[Path, str]]:
    if model_type == "bert":
        yield vocabularies.bert, "vocab.txt"
    elif kind.startswith("sentencepiece"):
        yield vocabularies.sentencepiece, "spiece.model" if kind.endswith("own library") else "tokenizer.model"
    else:
        yield vocabularies.gpt2 / "vocab.json", "vocab.json"
        yield vocabularies.gpt2 / "merges.txt", "merges.txt"


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Vocabularies:
    """The small vocabularies, trained once."""
    return trained_vocabularies(tmp_path_factory.mktemp("vocabularies"))
