"""The files that hold a vocabulary, as plain values: BERT's vocab.txt, and GPT-2's vocab.json with merges.txt.

The library's own readers cut lines and trim tokens in ways of their own and end in exceptions of their own; read here,
a token is its whole line and every fault is a sentence with the option and the file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron3d.errors import DataError
from megatron3d.files.json_text import is_whole_number, parse_object
from megatron3d.files.text import read_lines

_MOST_IDS = 2**31 - 1  # ids are kept in int32
_MERGES_HEADER = "#version"
_Content = TypeVar("_Content")


def read_word_pieces(path: Path) -> dict[str, int]:
    """The tokens of a vocab.txt, one a line, with their ids from 0 on.

    Raises: DataError if it cannot be read or is not UTF-8.
    """
    lines = _read(path, "--vocab-file", read_lines)
    return {token: id for id, token in enumerate(lines)}


def read_bpe(vocab_file: Path, merge_file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens with their ids of a vocab.json, and the pairs of a merges.txt in their order.

    Raises: DataError if one cannot be read, is not UTF-8, or holds something else.
    """
    vocab = _read(vocab_file, "--vocab-file", lambda path: parse_object(path.read_bytes()))
    wrong = next((token for token, id in vocab.items() if not is_whole_number(id, 0, _MOST_IDS)), None)
    if wrong is not None:
        raise DataError(
            f"--vocab-file {vocab_file} is no vocab.json: the id of {wrong!r} is {vocab[wrong]!r:.40}, which must be a "
            "whole number from 0 up."
        )
    merges = []
    for number, line in enumerate(_read(merge_file, "--merge-file", read_lines), start=1):
        if line.startswith(_MERGES_HEADER):
            continue
        first, _, second = line.partition(" ")
        if not first or not second or " " in second:
            raise DataError(
                f"--merge-file {merge_file}, line {number} is {line!r:.40}; it must hold two pieces with a space "
                "between."
            )
        # The library checks the three with a panic of its Rust code for some of them.
        lacking = next((piece for piece in (first, second, first + second) if piece not in vocab), None)
        if lacking is not None:
            raise DataError(
                f"--merge-file {merge_file}, line {number} merges {first!r:.40} and {second!r:.40}, but "
                f"{lacking!r:.80} is no token of --vocab-file {vocab_file}; give the two files of one tokenizer."
            )
        merges.append((first, second))
    return vocab, merges


def _read(path: Path, flag: str, reader: Callable[[Path], _Content]) -> _Content:
    """The content of a file. Raises: DataError with its option."""
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"{flag} {path} cannot be read ({error.strerror or error}); name a file.") from error
    except ValueError as error:
        raise DataError(f"{flag} {path} cannot be read ({error}); name the file of the tokenizer.") from error
