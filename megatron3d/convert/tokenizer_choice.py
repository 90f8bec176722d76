"""The tokenizer of a checkpoint for a tool that uses it: where its files are now, and what a command line says instead.

One place for generation, embedding, fine-tuning and both exports, so that the same options mean the same to all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron3d.config.data import DataConfig
from megatron3d.convert.tokenizer_files import DESCRIBED, TOKENIZER_FOLDER, WORD_PIECES
from megatron3d.data.tokenizer import TokenizerSpec
from megatron3d.data.tokenizer_interface import Tokenizer
from megatron3d.errors import ConfigError

_FILES = ("vocab_file", "merge_file", "tokenizer_model")


def beside_checkpoint(data: DataConfig, checkpoint: Path) -> DataConfig:
    """The options with the tokenizer's files that were copied beside the checkpoints.

    All of them may have moved together, to another place or another machine: a copy beside the checkpoints counts
    before the path that the run names, other files count only where the named ones are gone.
    """
    folder = checkpoint.parent / TOKENIZER_FOLDER

    def found(value: str | None) -> str | None:
        if value is None:
            return None
        path = Path(value)
        beside = folder if path.name == TOKENIZER_FOLDER else folder / path.name
        was_copied = TOKENIZER_FOLDER in (path.name, path.parent.name)
        return str(beside) if beside.exists() and (was_copied or not path.exists()) else value

    return replace(data, **{name: found(vars(data)[name]) for name in _FILES})


def with_given(data: DataConfig, given: Mapping[str, str | None]) -> DataConfig:
    """The options with those of a command line instead, where it has any.

    A vocabulary of word pieces alone does not say how words are cut: it is read as `tokenizer_config.json` beside it
    says, or as the run reads its own; a run without a tokenizer takes it as lower case, as training does.

    Args:
        data: the options of the run.
        given: `tokenizer_type` and the names of files, None where the command line has none.

    Raises:
        ConfigError: files are given without a kind, and the run's own kind has no such files.
    """
    named = {name: given[name] for name in ("tokenizer_type", *_FILES) if given.get(name) is not None}
    own, vocabulary = data.tokenizer_type, named.get("vocab_file")
    if named.get("tokenizer_type", own) != own or (own == DESCRIBED and "tokenizer_model" in named):
        return replace(data, **(dict.fromkeys(_FILES) | named))  # the run's own files are those of its own kind
    if vocabulary is None or "tokenizer_type" in named:
        return replace(data, **named)
    if own in (*WORD_PIECES, "GPT2BPETokenizer"):
        return replace(data, **named)
    path = Path(vocabulary)
    if path.name == "vocab.txt" and (path.parent / "tokenizer_config.json").is_file():
        return replace(data, tokenizer_type=DESCRIBED, tokenizer_model=str(path.parent), vocab_file=None)
    if own is not None:
        raise ConfigError(
            f"--vocab-file {vocabulary} is a list of tokens and does not say how texts are cut, and the model's own "
            f"tokenizer is a {own} ({data.tokenizer_model}); give its directory with --tokenizer-model, or say how to "
            "read the file with --tokenizer-type BertWordPieceLowerCase, BertWordPieceCase or GPT2BPETokenizer"
        )
    return replace(
        data, tokenizer_type="GPT2BPETokenizer" if "merge_file" in named else "BertWordPieceLowerCase", **named
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
    return TokenizerSpec(data.tokenizer_type, **files, vocab_size=vocab_size).build()
