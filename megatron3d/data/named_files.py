"""Whether the files are there that the data options name, all of them at once and before any is opened.

Opening them one after the other finds one mistake at each start, and none while anything else is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron3d.config.derive import TOKENIZER_ALIASES
from megatron3d.config.sections.data import DataConfig
from megatron3d.data.blend import parse_data_path, read_data_args_file
from megatron3d.data.indexed import check_files_exist
from megatron3d.data.tokenizer import TOKENIZER_TYPES, existing_file, unknown_kind
from megatron3d.errors import ConfigError, DataError

_BY_KIND = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "ByteTokenizer": (),
    "NullTokenizer": (),
}
_PREFIXES = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def missing_files(data: DataConfig) -> list[ConfigError | DataError]:
    """An error for each file that is named and missing, and for a kind of tokenizer that is not known.

    Options that contradict each other are for others to find: what cannot be read as prefixes is passed over.
    """
    return [*_of_tokenizer(data), *(() if data.mock_data else _of_corpora(data))]


def _of_tokenizer(data: DataConfig) -> Iterator[ConfigError | DataError]:
    kind = TOKENIZER_ALIASES.get(data.tokenizer_type or "", data.tokenizer_type)
    if kind is not None and kind not in TOKENIZER_TYPES:
        yield unknown_kind(kind)
    names = _BY_KIND.get(kind or "", ("tokenizer_model",) if kind else ("vocab_file", "merge_file"))
    if kind == "HuggingFaceTokenizer" and data.tokenizer_model is None:
        names = ("vocab_file",)
    for name in names:
        if value := vars(data)[name]:
            yield from _error_of(existing_file, f"--{name.replace('_', '-')}", value)


def _of_corpora(data: DataConfig) -> Iterator[ConfigError | DataError]:
    given = [(vars(data)[name], f"--{name.replace('_', '-')}") for name in _PREFIXES]
    if data.data_args_path is not None:
        try:
            given.append(read_data_args_file(data.data_args_path))
        except DataError as error:
            yield error
    for words, flag in given:
        try:
            corpora = parse_data_path(words, flag) if words else ()
        except ConfigError:
            continue
        for corpus in corpora:
            yield from _error_of(check_files_exist, corpus.prefix)


def _error_of(look: Callable[..., object], *arguments: Any) -> Iterator[DataError]:
    try:
        look(*arguments)
    except DataError as error:
        yield error
