"""The tokenizer of a run in a directory of Hugging Face: what makes AutoTokenizer give the ids of the training.

    GPT2BPETokenizer, BertWordPiece...     their own files, and the class that reads them so
    HuggingFaceTokenizer                   its own files as they are
    TikTokenizer, ByteTokenizer            a tokenizer.json
    SentencePieceTokenizer and its like    a tokenizer.json where that gives the same ids, else the model itself with
                                           the class that runs the sentencepiece library (`sentencepiece_json.py`)
    NullTokenizer                          nothing: it has no texts

Each names the tokens that end and begin a text, where the vocabulary has them. `hf-import` takes every one back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.convert.sentencepiece_json import SentencePieceModel, as_tokenizer_json, read_sentencepiece
from megatron3d.convert.tokenizer_files import existing_file, files_of
from megatron3d.data.hf_sentencepiece import SENTENCEPIECE_CLASS, SENTENCEPIECE_FILE
from megatron3d.data.tiktoken_file import TikTokenModel, byte_pair_library, tiktoken_options
from megatron3d.data.tokenizer import END_OF_TEXT, SENTENCEPIECE_KINDS

_FAST_CLASS = "PreTrainedTokenizerFast"  # the class that takes a tokenizer.json as it is


@dataclass(frozen=True)
class ExportedTokenizer:
    """The files by path within the directory, and sentences about them for the user."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


def exported_tokenizer(data: DataConfig, model: ModelConfig) -> ExportedTokenizer:
    """The tokenizer that the options name, for a directory of Hugging Face; no file where they name none.

    Raises:
        CheckpointError: a file that the run names is not there.
        DataError: a file is damaged, or no tokenizer.json can hold what it says.
    """
    kind = data.tokenizer_type
    if kind == "NullTokenizer":
        note = (
            "a NullTokenizer reads token ids that are written as numbers, which no tokenizer of transformers does: "
            "none is written; give the model ids"
        )
        return ExportedTokenizer({}, (note,))
    if kind in SENTENCEPIECE_KINDS and data.tokenizer_model is not None:
        return _of_sentencepiece(existing_file(data.tokenizer_model), model)
    if kind == "TikTokenizer" and data.tokenizer_model is not None:
        return ExportedTokenizer(_of_tiktoken(existing_file(data.tokenizer_model), data, model))
    if kind == "ByteTokenizer":
        return ExportedTokenizer(_of_bytes(model))
    return ExportedTokenizer(files_of(data, model))


def _of_tiktoken(path: Path, data: DataConfig, model: ModelConfig) -> dict[str, bytes]:
    ours = TikTokenModel(path, tiktoken_options(data), model.vocab_size)
    special = ours.special_tokens
    library = byte_pair_library(ours.tokens, first_id=len(special), pattern=ours.pattern, special_tokens=special)
    # Those without a name of their own (<SPECIAL_n>) are in the vocabulary, and no text is searched for them.
    named = special[: ours.num_named_tokens]
    return _fast(library, model, named, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def _of_bytes(model: ModelConfig) -> dict[str, bytes]:
    """The 256 bytes and the end of a document, which gets a name."""
    every_byte = [bytes([byte]) for byte in range(256)]
    library = byte_pair_library(every_byte, first_id=0, pattern=r"[\s\S]", special_tokens=[END_OF_TEXT])
    return _fast(library, model, [END_OF_TEXT], eos_token=END_OF_TEXT, bos_token=None)


def _of_sentencepiece(path: Path, model: ModelConfig) -> ExportedTokenizer:
    found = read_sentencepiece(path)
    names = {part: found.names.get(part) for part in ("eos_token", "bos_token", "pad_token", "unk_token")}
    notes = []
    if model.traits.samples == "sentences":
        notes.append("the exported tokenizer puts no [CLS] and [SEP] around a text; put their ids there yourself")
    names |= {part: found.names.get(part) for part in ("cls_token", "sep_token", "mask_token")}
    library = as_tokenizer_json(found)
    if library is not None:
        return ExportedTokenizer(_fast(library, model, list(filter(None, names.values())), **names), tuple(notes))
    notes.insert(0, _note_on_library(found))
    files = _settings({"tokenizer_class": SENTENCEPIECE_CLASS, **names}, model)
    return ExportedTokenizer({SENTENCEPIECE_FILE: found.content, **files}, tuple(notes))


def _note_on_library(found: SentencePieceModel) -> str:
    note = (
        f"{SENTENCEPIECE_FILE} is read by {SENTENCEPIECE_CLASS}, the class of transformers that runs the sentencepiece "
        "library, for no tokenizer.json gives the same ids; it needs the package sentencepiece"
    )
    if found.has_bytes:
        note += (
            "; its decode() spells the bytes of characters that have no piece, such as <0x0A>: decode with "
            "sentencepiece itself where there are any"
        )
    return note


def _fast(
    library: tokenizers.Tokenizer, model: ModelConfig, special: Sequence[str], **names: str | None
) -> dict[str, bytes]:
    """A tokenizer.json with its special tokens, and the settings that go with it."""
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    content = (library.to_str(pretty=False) + "\n").encode()
    return {"tokenizer.json": content, **_settings({"tokenizer_class": _FAST_CLASS, **names}, model)}


def _settings(values: Mapping[str, Any], model: ModelConfig) -> dict[str, bytes]:
    """`tokenizer_config.json`; the longest text is what the model has positions for."""
    settings = {
        **values,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.max_position_embeddings,
    }
    return {"tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode()}
