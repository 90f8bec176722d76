"""The files that hold a vocabulary, as plain values: BERT's vocab.txt, and GPT-2's vocab.json with merges.txt.

The library's own readers cut lines in ways of their own and end in exceptions of their own; read here, a line ends with
a line feed alone and every fault is a sentence with the option and the file.
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


def read_word_pieces(path: Path, *, options: bool = True) -> dict[str, int]:
    """The tokens of a vocab.txt, one a line, with their ids from 0 on; without `options` errors name the file alone.

    White space at the end of a line is no part of the token, as in transformers: texts are cut at it, so that no word
    could ever be such a token. A line of white space alone stays, as the numbers of lines are the ids.

    Raises: DataError if it cannot be read or is not UTF-8.
    """
    lines = _read(path, f"--vocab-file {path}" if options else str(path), read_lines)
    return {line.rstrip() or line: id for id, line in enumerate(lines)}


def read_bpe(
    vocab_file: Path, merge_file: Path, *, options: bool = True
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens with their ids of a vocab.json, and the pairs of a merges.txt in their order.

    Without `options` errors name the files alone, not the flags that give them.

    Raises: DataError if one cannot be read, is not UTF-8, or holds something else.
    """
    tokens_name = f"--vocab-file {vocab_file}" if options else str(vocab_file)
    merges_name = f"--merge-file {merge_file}" if options else str(merge_file)
    vocab = _read(vocab_file, tokens_name, lambda path: parse_object(path.read_bytes()))
    wrong = next((token for token, id in vocab.items() if not is_whole_number(id, 0, _MOST_IDS)), None)
    if wrong is not None:
        raise DataError(
            f"{tokens_name} is no vocab.json: the id of {wrong!r} is {vocab[wrong]!r:.40}, which must be a "
            "whole number from 0 up."
        )
    merges = []
    for number, line in enumerate(_read(merge_file, merges_name, read_lines), start=1):
        if line.startswith(_MERGES_HEADER):
            continue
        first, _, second = line.partition(" ")
        if not first or not second or " " in second:
            raise DataError(
                f"{merges_name}, line {number} is {line!r:.40}; it must hold two pieces with a space between."
            )
        # The library checks the three with a panic of its Rust code for some of them.
        lacking = next((piece for piece in (first, second, first + second) if piece not in vocab), None)
        if lacking is not None:
            raise DataError(
                f"{merges_name}, line {number} merges {first!r:.40} and {second!r:.40}, but "
                f"{lacking!r:.80} is no token of {tokens_name}; give the two files of one tokenizer."
            )
        merges.append((first, second))
    return vocab, merges


def _read(path: Path, name: str, reader: Callable[[Path], _Content]) -> _Content:
    """The content of a file. Raises: DataError with its name."""
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror or error}); name a file.") from error
    except ValueError as error:
        raise DataError(f"{name} cannot be read ({error}); name the file of the tokenizer.") from error
