"""The tokenizer that lies beside a model's weights: which of its files are copied, and which of our kinds they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron3d.checkpoint.durable import storage_errors, sync_directory, write_file
from megatron3d.config.data import DataConfig
from megatron3d.config.model import ModelConfig
from megatron3d.errors import CheckpointError
from megatron3d.files.json_text import parse_object
from megatron3d.files.text import TextError, read_lines

_DESCRIPTIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model")
_WORD_PIECES = {"BertWordPieceLowerCase": True, "BertWordPieceCase": False}


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a directory, by name; none if there is no tokenizer."""
    found = {name: directory / name for name in (*_VOCABULARIES, *_DESCRIPTIONS) if (directory / name).is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files into a new directory; returns their names.

    Raises:
        StorageError: the file system refused.
    """
    files = tokenizer_files(source)
    if files:
        with storage_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                write_file(target / name, [content])
            sync_directory(target)
    return list(files)


def data_of(directory: Path, model: ModelConfig, settings: Mapping[str, Any]) -> DataConfig:
    """The tokenizer in `directory` as the options of a run.

    Args:
        directory: holds the files, see `tokenizer_files`.
        model: its architecture decides between several kinds, and its vocabulary must hold all ids.
        settings: the values of the model's `config.json`.

    Raises:
        CheckpointError: a file is damaged, or has more tokens than the model.
    """
    eos = settings.get("eos_token_id")
    is_id = isinstance(eos, int) and not isinstance(eos, bool) and 0 <= eos < model.vocab_size
    eod = eos if model.architecture == "gpt" and is_id else None

    def path(name: str) -> str | None:
        return str((directory / name).absolute()) if (directory / name).is_file() else None

    words, pairs, merges = path("vocab.txt"), path("vocab.json"), path("merges.txt")
    described, pieces = path("tokenizer.json"), path("tokenizer.model")
    if model.architecture == "bert" and words:
        try:
            num_words = len(read_lines(Path(words)))
        except (OSError, TextError) as error:
            raise CheckpointError(f"{words} cannot be read ({error}); fetch the file again") from error
        _check_size(Path(words), num_words, model)
        kind = "BertWordPieceLowerCase" if _lowers_case(directory) else "BertWordPieceCase"
        return DataConfig(tokenizer_type=kind, vocab_file=words)
    if model.architecture == "gpt" and pairs and merges:
        _check_size(Path(pairs), len(_json_of(Path(pairs))), model)
        return DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=pairs, merge_file=merges, eod_token=eod)
    if described:
        return DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=described, eod_token=eod)
    if pieces:
        return DataConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=pieces, eod_token=eod)
    return DataConfig(eod_token=eod)


def files_of(data: DataConfig, model: ModelConfig) -> dict[str, bytes]:
    """The files of a run's tokenizer under Hugging Face's names; none where the run names no tokenizer of theirs.

    Where the files lie in a tokenizer's own directory, the descriptions beside them come along.

    Raises:
        CheckpointError: a file that the run names is not there.
    """
    named = {
        "vocab.txt" if data.tokenizer_type in _WORD_PIECES else "vocab.json": data.vocab_file,
        "merges.txt": data.merge_file,
        "tokenizer.json" if data.tokenizer_type == "HuggingFaceTokenizer" else "tokenizer.model": data.tokenizer_model,
    }
    files: dict[str, bytes] = {}
    for name, value in named.items():
        if value is None:
            continue
        path = Path(value) / name if Path(value).is_dir() else Path(value)
        if not path.is_file():
            raise CheckpointError(
                f"{path}, a file of the checkpoint's tokenizer, is not there; say where it is with --vocab-file, "
                "--merge-file or --tokenizer-model, or leave it out with --no-tokenizer"
            )
        beside = tokenizer_files(path.parent)
        if any(description in beside for description in _DESCRIPTIONS):
            files |= beside
        files[name] = path.read_bytes()
    if data.tokenizer_type in _WORD_PIECES and "vocab.txt" in files:
        files.setdefault("tokenizer_config.json", _description(data, model))
    return files


def _description(data: DataConfig, model: ModelConfig) -> bytes:
    values = {
        "do_lower_case": _WORD_PIECES[data.tokenizer_type],
        "model_max_length": model.max_position_embeddings,
        "tokenizer_class": "BertTokenizer",
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def _lowers_case(directory: Path) -> bool:
    """Whether word pieces are of lower case; transformers' default where nothing says so."""
    path = directory / "tokenizer_config.json"
    return bool(_json_of(path).get("do_lower_case", True)) if path.is_file() else True


def _json_of(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); repair or remove it") from error


def _check_size(path: Path, num_tokens: int, model: ModelConfig) -> None:
    if num_tokens > model.vocab_size:
        raise CheckpointError(
            f"{path} has {num_tokens} tokens, but the model beside it has vocab_size {model.vocab_size}: they do not "
            "belong together; put the vocabulary of this model there"
        )
