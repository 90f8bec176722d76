"""What must hold between the options of the tokenizer: a kind has its files, and no others name a second tokenizer.

Whether the kind is known and the files are there is looked at elsewhere (`data/named_files.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from megatron3d.config.options import BY_NAME
from megatron3d.config.sections.data import DataConfig

_FILES = ("vocab_file", "merge_file", "tokenizer_model")
_FILES_OF_KIND = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
}


def tokenizer_rule(given: DataConfig, data: DataConfig, vocab_size: int | None) -> Iterator[str]:
    """The vocabulary comes from somewhere, and the options name one tokenizer."""
    if data.tokenizer_type is None and data.tokenizer_model is not None:
        yield (
            f"--tokenizer-model {data.tokenizer_model} is given without --tokenizer-type, so it is not known how to "
            "read it; give --tokenizer-type, for a directory of Hugging Face HuggingFaceTokenizer."
        )
    elif data.tokenizer_type is None and vocab_size is None:
        yield (
            "The size of the vocabulary is unknown; name the tokenizer by --tokenizer-type with its files, or give "
            "--vocab-size."
        )
    for name in _FILES_OF_KIND.get(data.tokenizer_type or "", ()):
        if vars(data)[name] is None:
            flag = BY_NAME[name].spelling
            yield f"--tokenizer-type {data.tokenizer_type} reads {flag}, which is not given; name the file."
    yield from _second_tokenizer(given, data)
    if data.tokenizer_type == "NullTokenizer" and vocab_size is None:
        yield "--tokenizer-type NullTokenizer needs --vocab-size, the number of token ids in the data; give it."


def _second_tokenizer(given: DataConfig, data: DataConfig) -> Iterator[str]:
    """Files of another kind than the one that is used. Kinds without files have no second tokenizer beside them."""
    kind = data.tokenizer_type or ""
    used = {name: vars(data)[name] for name in _FILES_OF_KIND.get(kind, ()) if vars(data)[name]}
    if not used:
        return
    chosen = " ".join(f"{BY_NAME[name].spelling} {value}" for name, value in used.items())
    chosen = f"--tokenizer-type {kind} {chosen}" if given.tokenizer_type else f"{chosen} (a {kind})"
    for name in _FILES:
        value = vars(data)[name]
        if value and name not in used and not (kind == "HuggingFaceTokenizer" and _lies_in(value, used)):
            yield (
                f"{chosen} and {BY_NAME[name].spelling} {value} name two tokenizers, of which one can be used; "
                "leave one of them out."
            )


def _lies_in(file: str, used: dict[str, str]) -> bool:
    """Whether a vocabulary is that of the directory which describes the tokenizer, or lies beside its file."""
    named = used["tokenizer_model"]
    folder = os.path.dirname(named) if named.endswith(".json") else named
    return os.path.realpath(os.path.dirname(file)) == os.path.realpath(folder)
