"""Each kind of tokenizer as a directory of Hugging Face: transformers gives the ids of the training there, the tokens
that end and begin a text are the same, and our own import takes the directory back."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import read_document
from megatron3d.comm.launch import Launch
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.serialize import from_dict
from megatron3d.convert import sentencepiece_json
from megatron3d.convert.hf import read_model, save_model
from megatron3d.convert.sentencepiece_json import as_tokenizer_json, read_sentencepiece
from megatron3d.convert.tokenizer_choice import tokenizer_of
from megatron3d.convert.tokenizer_export import exported_tokenizer
from megatron3d.convert.tokenizer_files import write_files
from megatron3d.data.hf_tokenizer import described_tokenizer
from megatron3d.data.tokenizer import Tokenizer
from megatron3d.errors import DataError
from megatron3d.train.launch import RunContext
from tests.data.corpora import SHARED, needs_shared
from tests.data.hf_directories import TEXTS, Vocabularies, vocabularies  # noqa: F401
from tests.data.test_hf_tokenizer import multilingual
from tests.nn.dense import model_config
from tools import convert_checkpoint

transformers = pytest.importorskip("transformers")
LIBRARY, JSON, OWN_FILES = "BertGenerationTokenizer", "TokenizersBackend", ""
_MERGED = ("th", "he", "the", " t", " the", "in", "ing", "18", "89", "1898", "ü", "für", "文", "тр", "ال")


def train_sentencepiece(prefix: Path, **options: Any) -> Path:
    """A small sentencepiece model of the texts."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if text.strip() and "\x00" not in text] * 5),
        model_prefix=str(prefix),
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return prefix.with_suffix(".model")


def like_llama(prefix: Path, **options: Any) -> Path:
    """One of the kind that Llama 2 has: BPE with bytes, and texts as they are."""
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
    extra = {"allow_whitespace_only_pieces": True, "max_sentence_length": 9999}
    kind = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 460}
    return train_sentencepiece(prefix, **{**identity, **extra, **kind, **options})


def write_ranks(path: Path, tokens: Sequence[bytes]) -> Path:
    """A TikTokenizer's file."""
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(entries))
    return path


def ranks(folder: Path) -> Path:
    """One with tokens of several scripts."""
    return write_ranks(folder / "ranks.json", [*(bytes([byte]) for byte in range(256)), *map(str.encode, _MERGED)])


def without_end(folder: Path, gpt2: Path) -> dict[str, str]:
    """GPT-2's files without the token that ends a text: its id is that of a token no text gives."""
    vocabulary = json.loads((gpt2 / "vocab.json").read_text())
    vocabulary["<|other|>"] = vocabulary.pop("<|endoftext|>")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return {"vocab_file": str(folder / "vocab.json"), "merge_file": str(gpt2 / "merges.txt")}


# Kind -> the class of transformers (OWN_FILES: that which the kind's own files have always had), and the options.
Maker = Callable[[Path, Vocabularies], dict[str, Any]]
KINDS: dict[str, tuple[str, str, Maker]] = {
    "GPT-2": (
        *("GPT2BPETokenizer", OWN_FILES),
        lambda folder, v: {"vocab_file": str(v.gpt2 / "vocab.json"), "merge_file": str(v.gpt2 / "merges.txt")},
    ),
    "GPT-2 without an end": ("GPT2BPETokenizer", OWN_FILES, lambda folder, v: without_end(folder, v.gpt2)),
    "word pieces": ("BertWordPieceLowerCase", OWN_FILES, lambda folder, v: {"vocab_file": str(v.bert)}),
    "word pieces cased": ("BertWordPieceCase", OWN_FILES, lambda folder, v: {"vocab_file": str(v.bert)}),
    "sentencepiece like Llama's": (
        *("Llama2Tokenizer", JSON),
        lambda folder, v: {"tokenizer_model": str(like_llama(folder / "s"))},
    ),
    "the same without a space in front": (
        *("Llama2Tokenizer", JSON),
        lambda folder, v: {"tokenizer_model": str(like_llama(folder / "s", add_dummy_prefix=False, pad_id=3))},
    ),
    "unigram": (
        *("SentencePieceTokenizer", LIBRARY),
        lambda folder, v: {"tokenizer_model": str(train_sentencepiece(folder / "s", vocab_size=200, bos_id=-1))},
    ),
    "BPE with a table of characters": (
        *("GPTSentencePieceTokenizer", LIBRARY),
        lambda folder, v: {"tokenizer_model": str(v.sentencepiece)},
    ),
    "TikTokenizer": (
        *("TikTokenizer", JSON),
        lambda folder, v: {"tokenizer_model": str(ranks(folder)), "tiktoken_num_special_tokens": 10},
    ),
    "TikTokenizer of the first pattern, cut off": (
        *("TikTokenizer", JSON),
        lambda folder, v: {
            "tokenizer_model": str(ranks(folder)),
            "tiktoken_pattern": "v1",
            "tiktoken_num_special_tokens": 5,
            "tiktoken_special_tokens": ("<pad>", "<s>", "</s>", "<unk>"),
        },
    ),
    "bytes": ("ByteTokenizer", JSON, lambda folder, v: {}),
}


def export(kind: str, folder: Path, found: Vocabularies, architecture: str = "gpt") -> tuple[Tokenizer, Path]:
    """The tokenizer of a run, and the directory that an export writes of it."""
    name, _, options = KINDS[kind]
    folder.mkdir()
    data = DataConfig(tokenizer_type=name, **options(folder, found))
    vocab_size = 5 + 256 + 7 if "cut off" in kind else 10 + 256 + len(_MERGED)  # others have their own number
    own = tokenizer_of(data, vocab_size)
    assert own is not None
    model = model_config(architecture=architecture, vocab_size=own.vocab_size, max_position_embeddings=64)
    directory = folder / "there"
    write_files(directory, exported_tokenizer(data, model).files)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2" if architecture == "gpt" else "bert"}))
    return own, directory


def assert_same_ids(own: Tokenizer, directory: Path, texts: Sequence[str]) -> Any:
    """transformers gives the ids of the run, ours after an import those of transformers; returns transformers'."""
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    imported = described_tokenizer(directory)
    expected = theirs(list(texts), add_special_tokens=False)["input_ids"]
    for text, ids, back, there in zip(
        texts, own.encode_batch(texts), imported.encode_batch(texts), expected, strict=True
    ):
        assert back == there, f"imported: {text[:80]!r}"
        if not any(name in text for name in theirs.all_special_tokens):
            assert ids == there, text[:80]
    return theirs


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_ids_of_the_training_and_the_import_takes_them_back(
    kind: str,
    tmp_path: Path,
    vocabularies: Vocabularies,  # noqa: F811
) -> None:
    own, directory = export(kind, tmp_path / "k", vocabularies)
    theirs = assert_same_ids(own, directory, TEXTS)
    imported = described_tokenizer(directory)
    if wanted := KINDS[kind][1]:
        assert type(theirs).__name__ == wanted
    assert (theirs.eos_token_id, theirs.bos_token_id) == (own.eod, own.bos)
    assert (imported.eod, imported.bos, imported.vocab_size) == (own.eod, own.bos, own.vocab_size)
    assert len(theirs) <= own.vocab_size, "no token lies beyond the model's rows"
    if theirs.eos_token is not None:
        ended = theirs("für" + theirs.eos_token, add_special_tokens=False)["input_ids"]
        assert ended == [*own.encode("für"), own.eod] == imported.encode("für" + theirs.eos_token)
    if wanted == JSON:
        for text in TEXTS:
            assert theirs.decode(own.encode(text)) == own.decode(own.encode(text)), text


@needs_shared
@pytest.mark.parametrize("kind", ["sentencepiece like Llama's", "unigram", "TikTokenizer", "bytes"])
def test_ids_are_those_of_the_training_in_every_script(
    kind: str,
    tmp_path: Path,
    vocabularies: Vocabularies,  # noqa: F811
) -> None:
    own, directory = export(kind, tmp_path / "k", vocabularies)
    assert_same_ids(own, directory, [text[:400] for text in multilingual(each=1)])


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_all_multilingual_text_are_those_of_the_training(
    kind: str,
    tmp_path: Path,
    vocabularies: Vocabularies,  # noqa: F811
) -> None:
    own, directory = export(kind, tmp_path / "k", vocabularies)
    assert_same_ids(own, directory, multilingual())


@needs_shared
def test_a_published_sentencepiece_model_is_read_in_every_script(tmp_path: Path) -> None:
    model = SHARED / "tokenizers/sentencepiece/test_model.model"
    data = DataConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(model))
    exported = exported_tokenizer(data, model_config(vocab_size=1000, max_position_embeddings=64))
    write_files(tmp_path, exported.files)
    own = tokenizer_of(data, 1000)
    assert own is not None and (own.eod, own.bos) == (2, 1)
    theirs = assert_same_ids(own, tmp_path, [text[:400] for text in multilingual(each=1)])
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (2, 1, 1000)
    assert len(exported.notes) == 1 and "runs the sentencepiece library" in exported.notes[0]


def test_a_sentencepiece_model_that_the_other_library_would_cut_otherwise_is_left_to_sentencepiece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_sentencepiece(like_llama(tmp_path / "s"))
    assert as_tokenizer_json(found) is not None
    in_order = sentencepiece_json.merges_of
    monkeypatch.setattr(sentencepiece_json, "merges_of", lambda pieces: in_order(pieces)[::-1])
    assert as_tokenizer_json(found) is None


def test_a_special_token_that_is_the_text_of_another_is_refused(tmp_path: Path) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), b"</", b"</s", b"</s>"]
    data = DataConfig(tokenizer_type="TikTokenizer", tokenizer_model=str(write_ranks(tmp_path / "r.json", tokens)))
    with pytest.raises(DataError, match=r"special token </s> is also the text of token 1258, .* \(--no-tokenizer\)"):
        exported_tokenizer(data, model_config(vocab_size=1259, max_position_embeddings=64))


def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
    convert_checkpoint.main(RunContext(Launch()))
    return capsys.readouterr().out


def small_model(directory: Path, vocab_size: int) -> None:
    """A small Llama with random weights and no tokenizer."""
    torch.manual_seed(3)
    sizes = {"num_attention_heads": 2, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    config = transformers.LlamaConfig(**sizes, vocab_size=vocab_size, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def test_a_sentencepiece_run_goes_out_and_comes_in_by_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train_sentencepiece(tmp_path / "s", vocab_size=200)
    small_model(tmp_path / "there", 200)
    model.rename(tmp_path / "there" / "tokenizer.model")
    data = DataConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(tmp_path / "there" / "tokenizer.model"))
    found = replace(read_model(tmp_path / "there", with_tokenizer=False), data=data, settings={})
    save_model(found, tmp_path / "save")
    out = tool(monkeypatch, capsys, "hf-export", "--load", tmp_path / "save", "--hf", tmp_path / "out")
    assert "with spiece.model, tokenizer_config.json\nspiece.model is read by BertGenerationTokenizer" in out
    tool(monkeypatch, capsys, "hf-import", "--hf", tmp_path / "out", "--save", tmp_path / "again")
    own = tokenizer_of(data, 200)
    run = from_dict(read_document(find_checkpoint(tmp_path / "again"), "run"))
    back = tokenizer_of(run.data, 200)
    assert own is not None and back is not None and run.data.eod_token == own.eod
    assert back.encode_batch(TEXTS[:6]) == own.encode_batch(TEXTS[:6])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (own.eod, own.bos) == (2, 1)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded.generate(**theirs("ab" + theirs.eos_token, return_tensors="pt"), max_new_tokens=2)


def test_ids_that_are_numbers_go_out_without_a_tokenizer_and_the_export_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model(tmp_path / "there", 200)
    data = DataConfig(tokenizer_type="NullTokenizer", eod_token=199)
    save_model(replace(read_model(tmp_path / "there"), data=data, settings={}), tmp_path / "save")
    out = tool(monkeypatch, capsys, "hf-export", "--load", tmp_path / "save", "--hf", tmp_path / "out")
    assert "with no tokenizer\na NullTokenizer reads token ids that are written as numbers" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 199
