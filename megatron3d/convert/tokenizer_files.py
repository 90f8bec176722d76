"""The tokenizer beside a model's weights: its files on the way in and out, and the options of a run that name it.

How a directory's tokenizer is read is answered in `data/hf_tokenizer.py`. Here its files are copied whole, together
with what belongs to a model and makes no ids: the generation config and chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.data.hf_description import (
    COMPANION_FILES,
    MODEL_CONFIG,
    SETTING_FILES,
    VOCABULARY_FILES,
    companion_files,
    described_files,
    end_token_ids,
    tokenizer_files,
)
from megatron3d.data.hf_tokenizer import described_tokenizer, has_vocabulary
from megatron3d.data.tokenizer import END_OF_TEXT
from megatron3d.data.vocabulary_files import read_bpe
from megatron3d.errors import CheckpointError
from megatron3d.storage.durable import sync_directory, write_file
from megatron3d.storage.refusals import storage_errors

WORD_PIECES: Mapping[str, bool] = MappingProxyType({"BertWordPieceLowerCase": True, "BertWordPieceCase": False})
DESCRIBED = "HuggingFaceTokenizer"  # the kind of a tokenizer that its own directory describes


def copy_tokenizer(source: Path, target: Path, *, with_tokenizer: bool = True) -> list[str]:
    """Copy the tokenizer's files and what lies beside them into a new directory; returns their names.

    Raises:
        DataError: a JSON file among them is damaged.
        StorageError: the file system refused.
    """
    files = companion_files(source) | (tokenizer_files(source) if with_tokenizer else {})
    write_files(target, files)
    return list(files)


def write_files(target: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their paths within a directory, and remove those of a tokenizer that was there before.

    Raises:
        StorageError: the file system refused.
    """
    if not files:
        return
    with storage_errors("write the tokenizer file", target, way_out="give another directory"):
        for name in (*VOCABULARY_FILES, *SETTING_FILES, *COMPANION_FILES, MODEL_CONFIG):
            if name not in files:
                (target / name).unlink(missing_ok=True)
        for name, content in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(target / name, [content])
        sync_directory(target)


def data_of(directory: Path, model: ModelConfig, *, with_tokenizer: bool = True) -> DataConfig:
    """The tokenizer that a Hugging Face directory describes as the options of a run, and the end of its texts.

    Args:
        directory: holds `config.json` and, if it has a tokenizer, its files.
        model: its vocabulary must hold all ids.
        with_tokenizer: False takes the end of texts alone.

    Raises:
        DataError: the description cannot be taken, see `described_tokenizer`.
        CheckpointError: the tokenizer has more tokens than the model.
    """
    ends = [id for id in end_token_ids(directory) if id < model.vocab_size] if model.is_causal else []
    if not (with_tokenizer and has_vocabulary(directory)):
        return DataConfig(eod_token=ends[0] if ends else None)
    tokenizer = described_tokenizer(directory)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, but the model beside it has vocab_size "
            f"{model.vocab_size}: they do not belong together; put the tokenizer of this model there"
        )
    eod = tokenizer.eod if tokenizer.eod in ends else next(iter(ends), None)
    vocabulary = "vocab.txt" if (directory / "vocab.txt").is_file() else None
    return named_in(DataConfig(tokenizer_type=DESCRIBED, vocab_file=vocabulary, eod_token=eod), directory)


def files_of(data: DataConfig, model: ModelConfig) -> dict[str, bytes]:
    """The files of a run's tokenizer, by path, as a checkpoint keeps them; none where it has none.

    Those of a described tokenizer come whole, with what lies beside them. To GPT-2's and BERT's files comes a
    description that says what the kind does; what stands for the others in a directory of Hugging Face is in
    `tokenizer_export.py`.

    Raises:
        CheckpointError: a file that the run names is not there.
        DataError: the vocabulary of a GPT2BPETokenizer is damaged.
    """
    if data.tokenizer_type == DESCRIBED and data.tokenizer_model is not None:
        path = existing_file(data.tokenizer_model)
        folder = path if path.is_dir() else path.parent
        files = described_files(path)
        if not files:
            raise CheckpointError(_not_there(path))
        return files | companion_files(folder)
    named = {
        "vocab.txt" if data.tokenizer_type in WORD_PIECES else "vocab.json": data.vocab_file,
        "merges.txt": data.merge_file,
        "tokenizer.model": data.tokenizer_model,
    }
    files = {name: existing_file(value).read_bytes() for name, value in named.items() if value is not None}
    return files | (_description(data, model) if files else {})


def named_in(data: DataConfig, folder: Path) -> DataConfig:
    """The options of a run whose tokenizer's files, those of `files_of`, were written into `folder`."""
    if data.tokenizer_type == DESCRIBED:
        vocabulary = None if data.vocab_file is None else str((folder / "vocab.txt").absolute())
        return replace(data, tokenizer_model=str(folder.absolute()), vocab_file=vocabulary)
    names = {"vocab_file": "vocab.txt" if data.tokenizer_type in WORD_PIECES else "vocab.json"}
    names |= {"merge_file": "merges.txt", "tokenizer_model": "tokenizer.model"}
    given = {option: name for option, name in names.items() if vars(data)[option] is not None}
    return replace(data, **{option: str((folder / name).absolute()) for option, name in given.items()})


def existing_file(value: str) -> Path:
    """The path of a file of the tokenizer. Raises: CheckpointError if it is not there."""
    path = Path(value)
    if not path.exists():
        raise CheckpointError(_not_there(path))
    return path


def _not_there(path: Path) -> str:
    return (
        f"{path}, of the checkpoint's tokenizer, is not there or holds none; say where it is with --vocab-file, "
        "--merge-file or --tokenizer-model, or leave it out with --no-tokenizer"
    )


def _description(data: DataConfig, model: ModelConfig) -> dict[str, bytes]:
    """`tokenizer_config.json` of a kind whose files a class of transformers reads as the kind does; none of others."""
    values: dict[str, Any]
    if data.tokenizer_type is not None and data.tokenizer_type in WORD_PIECES:
        values = {"tokenizer_class": "BertTokenizer", "do_lower_case": WORD_PIECES[data.tokenizer_type]}
    elif data.tokenizer_type == "GPT2BPETokenizer":
        values = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT, "bos_token": None}
        vocabulary, _ = read_bpe(Path(data.vocab_file or ""), Path(data.merge_file or ""))
        if END_OF_TEXT not in vocabulary:
            # The class would add a token that the vocabulary lacks, with an id that the model has no row for.
            values |= {"eos_token": None, "unk_token": None}
    else:
        return {}
    values["model_max_length"] = model.max_position_embeddings
    return {"tokenizer_config.json": (json.dumps(values, indent=2) + "\n").encode()}
