"""What `--input` names: files of text by path or glob, standard input, and folders that `datasets` saved.

Formats by ending: `.jsonl`/`.json` (one JSON object a line, one document an object), `.txt` (the whole file is one
document under the key `text`), `.parquet` and `.arrow` (a row is a document); the text formats also compressed. A
folder written by `save_to_disk` of Hugging Face's datasets stands for its `.arrow` files, in the order of its own list.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron3d.data.prepare.compressed import COMPRESSIONS
from megatron3d.errors import ConfigError, DataError
from megatron3d.files.fields import Fields
from megatron3d.files.json_text import parse_object
from megatron3d.files.regular import read_regular

FORMATS = f".jsonl, .json, .txt (each also with {', '.join(COMPRESSIONS)}), .parquet and .arrow"
INPUT_HELP = f"paths or globs of {FORMATS} files, folders that datasets saved, or - for JSON lines on standard input"
STANDARD_INPUT = Path("-")
_STATE = "state.json"  # of a folder that datasets saved
_TEXT_KINDS = (".jsonl", ".json", ".txt")
COLUMN_KINDS = (".parquet", ".arrow")


def file_kind(file: Path) -> str:
    """The ending that says the format, without that of the compression; standard input is lines of JSON."""
    if file == STANDARD_INPUT:
        return ".jsonl"
    return (file.suffixes[-2:-1] or [""])[0] if is_compressed(file) else file.suffix


def is_compressed(file: Path) -> bool:
    """Whether the ending is that of a compression."""
    return file.suffix in COMPRESSIONS


def check_json_keys(keys: Sequence[str]) -> None:
    """Raises: ConfigError for keys that cannot be a part of the names of the output files."""
    for key in keys:
        if not key or any(character in key for character in ("/", os.sep, "\0")):
            raise ConfigError(
                f"--json-keys {key!r} cannot be a part of the name of a file (PREFIX_KEY_document); name keys that are "
                f"not empty and have no {os.sep!r}."
            )


def find_inputs(patterns: Sequence[str], *, note: Callable[[str], None]) -> list[Path]:
    """The files that `--input` names: each a path, a glob (whose matches are sorted), `-` for standard input, or a
    folder that `datasets` saved. A file named again, by another spelling or link too, counts once, and `note` takes a
    line about it.

    Raises: DataError if one names no file, or a folder that is no saved dataset; ConfigError for a file of a format
    that cannot be read.
    """
    files: dict[tuple[int, int], Path] = {}
    for pattern in patterns:
        for file in _files_of(pattern):
            first = files.setdefault(_identity(file), file)
            if first is not file:
                spelled = f" (as {first})" if first != file else ""
                note(f"--input {pattern}: {file} is named already{spelled}; it is read once, at its first place.")
    for file in files.values():
        kind = file_kind(file)
        if kind not in (*_TEXT_KINDS, *COLUMN_KINDS):
            raise ConfigError(f"--input {file} has an ending that is not known; the formats are {FORMATS}.")
        if kind in COLUMN_KINDS and file.suffix != kind:
            raise ConfigError(f"--input {file} is {kind} and compressed as a whole; decompress it: it is so inside.")
    return list(files.values())


def _identity(file: Path) -> tuple[int, int]:
    """What identifies a file by any of its names, hard links too."""
    if file == STANDARD_INPUT:
        return (-1, -1)
    status = os.stat(file)
    return (status.st_dev, status.st_ino)


def _files_of(pattern: str) -> list[Path]:
    """The files of one word of `--input`, in order."""
    if pattern == str(STANDARD_INPUT):
        return [Path(pattern)]
    if os.path.isdir(pattern):
        return _files_of_saved_dataset(Path(pattern))
    matches = [Path(match) for match in ([pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern)))]
    found = []
    for match in matches:
        if os.path.isfile(match):
            found.append(match)
        elif not os.path.isdir(match):
            raise _not_a_file(match)
        elif os.path.isfile(match / _STATE):
            found += _files_of_saved_dataset(match)
    if not found:
        raise DataError(f"--input {pattern} names no file; give paths or globs of {FORMATS} files.")
    return found


def _not_a_file(match: Path) -> DataError:
    """The error for what a path or glob names and is neither a file nor a folder."""
    try:
        os.stat(match)
    except OSError as error:  # most often a link
        return DataError(
            f"--input {match} cannot be read ({error.strerror}); restore the file that it stands for, or leave it out."
        )
    return DataError(f"--input {match} is a pipe or device; pipe lines of JSON into the command with --input -.")


def _files_of_saved_dataset(folder: Path) -> list[Path]:
    """The `.arrow` files of a folder that `save_to_disk` of Hugging Face's datasets wrote.

    Raises: DataError if it did not, if it holds several splits, or if a file that it lists is missing.
    """
    splits, state = folder / "dataset_dict.json", folder / _STATE
    try:
        if splits.is_file():
            names = Fields(parse_object(read_regular(splits)), "the file").texts("splits")
            raise DataError(
                f"--input {folder} holds the splits {', '.join(names)}; name one: --input {folder / names[0]}"
                if names
                else f"--input {folder} is a saved dataset without splits; save it again."
            )
        if not state.is_file():
            raise DataError(
                f"--input {folder} is a folder and not one that save_to_disk of datasets wrote: it has no state.json; "
                f"give paths or globs of {FORMATS} files, such as '{folder}/*.jsonl'."
            )
        listed = Fields(parse_object(read_regular(state)), "the file").rows("_data_files")
        files = [folder / one.text("filename") for one in listed]
    except (OSError, ValueError) as error:
        name = splits if splits.is_file() else state
        raise DataError(f"{name} cannot be read as the list of a saved dataset ({error}); save it again.") from error
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        reason = f"its files {', '.join(missing[:3])} are missing" if missing else "it lists no file"
        raise DataError(f"--input {folder} is an incomplete saved dataset: {reason}; save it again.")
    return files
