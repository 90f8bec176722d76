"""The tokenizer of a checkpoint for a tool that uses it: where its files are now, and what a command line says instead.

One place for generation, embedding, fine-tuning and both exports, so that the same options mean the same to all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron3d.config.sections.data import DataConfig
from megatron3d.convert.tokenizer_files import DESCRIBED
from megatron3d.data.tiktoken_file import tiktoken_options
from megatron3d.data.tokenizer import TokenizerSpec
from megatron3d.data.tokenizer_interface import Tokenizer
from megatron3d.errors import ConfigError

_FILES = ("vocab_file", "merge_file", "tokenizer_model")


def with_given(data: DataConfig, given: Mapping[str, str | None]) -> DataConfig:
    """The options with those of a command line instead, where it has any.

    Without a kind, files are read as the run reads its own. Where the run has no such files, a directory or a .json
    file is one that describes its tokenizer, and a vocabulary is read as `tokenizer_config.json` beside it says; a run
    without a tokenizer takes a vocabulary as training does.

    Args:
        data: the options of the run.
        given: `tokenizer_type` and the names of files, None where the command line has none.

    Raises:
        ConfigError: files are given without a kind, and nothing says how to read them.
    """
    named = {name: value for name in _FILES if (value := given.get(name)) is not None}
    kind = given.get("tokenizer_type")
    if kind is None:
        kind = _kind_of(data, named) if named else data.tokenizer_type
    if kind == DESCRIBED and "vocab_file" in named and "tokenizer_model" not in named:
        named = {"tokenizer_model": str(Path(named["vocab_file"]).parent)}
    if kind != data.tokenizer_type or (kind == DESCRIBED and named):
        named = dict.fromkeys(_FILES) | named  # the run's own files are those of its own kind
    return replace(data, tokenizer_type=kind, **named)


def _kind_of(data: DataConfig, named: Mapping[str, str]) -> str:
    """How files are read that are given without a kind."""
    own = data.tokenizer_type
    if own is not None and own != DESCRIBED and all(vars(data)[name] is not None for name in named):
        return own
    if "tokenizer_model" in named:
        path = Path(named["tokenizer_model"])
        if own == DESCRIBED or path.is_dir() or path.suffix == ".json":
            return DESCRIBED
    elif "vocab_file" in named:
        path = Path(named["vocab_file"])
        if path.name == "vocab.txt" and (path.parent / "tokenizer_config.json").is_file():
            return DESCRIBED
        if own is None:
            return "GPT2BPETokenizer" if "merge_file" in named else "BertWordPieceLowerCase"
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in named.items())
    its_own = f"is a {own} ({data.tokenizer_model or data.vocab_file or 'without files'})" if own else "is not known"
    raise ConfigError(
        f"{words} does not say how texts are cut, and the model's own tokenizer {its_own}; give a directory that "
        "describes its tokenizer with --tokenizer-model, or say how to read the file with --tokenizer-type"
    )


def tokenizer_of(data: DataConfig, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a run that knows texts, if it names one and its files are there.

    Raises:
        DataError: a file of it is damaged.
    """
    files = {name: vars(data)[name] for name in _FILES}
    if data.tokenizer_type in (None, "NullTokenizer") or not all(
        Path(value).exists() for value in files.values() if value
    ):
        return None
    return TokenizerSpec(data.tokenizer_type, **files, vocab_size=vocab_size, tiktoken=tiktoken_options(data)).build()
