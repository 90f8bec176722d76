"""A tokenizer as text inside another file: its kind, and its files byte for byte.

A served model is one file. Its tokenizer is built from exactly the files that trained it, whichever kind it is.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron3d.data.hf_description import described_files
from megatron3d.data.tokenizer import Tokenizer, TokenizerSpec
from megatron3d.errors import DataError
from megatron3d.files.json_text import parse_object

_FILE_OPTIONS = ("vocab_file", "merge_file", "tokenizer_model")
_DIRECTORY = "."


@dataclass(frozen=True)
class PackedTokenizer:
    """A tokenizer without a path.

    Attributes:
        kind: as `--tokenizer-type` takes it.
        options: which file each option of `TokenizerSpec` names; "." is the directory of all.
        files: contents by name.
    """

    kind: str
    options: Mapping[str, str]
    files: Mapping[str, bytes]

    def build(self) -> Tokenizer:
        """The tokenizer. Raises: DataError for files that are damaged."""
        with tempfile.TemporaryDirectory(prefix="megatron3d-tokenizer-") as folder:
            for name, content in self.files.items():
                (Path(folder) / name).write_bytes(content)
            paths: dict[str, Any] = {option: str(Path(folder) / name) for option, name in self.options.items()}
            return TokenizerSpec(self.kind, **paths).build()

    def to_text(self) -> str:
        """JSON, with the files in base 64: vocabularies are not all text."""
        files = {name: base64.b64encode(content).decode("ascii") for name, content in self.files.items()}
        return json.dumps({"kind": self.kind, "options": dict(self.options), "files": files})


def pack(spec: TokenizerSpec) -> PackedTokenizer:
    """Read the files of a tokenizer.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    paths = {"vocab_file": spec.vocab_file, "merge_file": spec.merge_file, "tokenizer_model": spec.tokenizer_model}
    if spec.tokenizer_type == "HuggingFaceTokenizer":
        return _packed_directory(
            Path(spec.tokenizer_model) if spec.tokenizer_model else Path(spec.vocab_file or "").parent
        )
    options = {option: Path(value).name for option, value in paths.items() if value is not None}
    files = {Path(value).name: _read(Path(value)) for value in paths.values() if value is not None}
    return PackedTokenizer(spec.tokenizer_type, options, files)


def _packed_directory(path: Path) -> PackedTokenizer:
    """A directory that describes its tokenizer, or a file with what lies beside it."""
    files = described_files(path)
    if not files:
        raise DataError(f"{path} has no file of a tokenizer; name its directory with --tokenizer-model")
    return PackedTokenizer("HuggingFaceTokenizer", {"tokenizer_model": _DIRECTORY}, files)


def from_text(text: str) -> PackedTokenizer:
    """The reverse of `to_text`.

    Raises:
        DataError: `text` is something else.
    """
    try:
        found = parse_object(text)
        kind, options = str(found["kind"]), dict(found["options"])
        files = {str(name): base64.b64decode(content, validate=True) for name, content in found["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the tokenizer inside the model cannot be read ({error}); export the model again") from error
    # Names become files of a temporary folder, and must not lead out of it.
    wrong = [name for name in (*files, *options.values()) if name != _DIRECTORY and not _is_plain(name)]
    wrong += [name for name in files if name == _DIRECTORY]
    wrong += [option for option in options if option not in _FILE_OPTIONS]
    if wrong:
        raise DataError(f"the tokenizer inside the model names {wrong[0]!r}, which is no file of it; export it again")
    return PackedTokenizer(kind, options, files)


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the tokenizer's file {path} cannot be read ({error.strerror}); name it with --vocab-file or "
            "--tokenizer-model"
        ) from error
