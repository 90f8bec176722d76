"""The index of a checkpoint: which tensors it holds, and in which file each box of each tensor lies, as plain data.

`index.json` is written last into a checkpoint; a directory without it is not a checkpoint. It carries a checksum of
itself, of every box and of every document, so that a flipped bit anywhere is found when the part it hit is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron3d.checkpoint.coverage import cover_problem
from megatron3d.checkpoint.refusals import storage_errors
from megatron3d.errors import CheckpointError
from megatron3d.files.fields import Fields
from megatron3d.files.json_text import parse_object
from megatron3d.files.regular import read_regular
from megatron3d.params.boxes import Box
from megatron3d.storage.checksum import crc32
from megatron3d.storage.durable import write_file

INDEX_NAME = "index.json"
FORMAT = "megatron3d-checkpoint"
VERSION = 1
# Names of files in a checkpoint: none leads out of its directory, none is hidden.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LISTED = 5  # problems listed in one message; a foreign index disagrees in every tensor

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


@dataclass(frozen=True)
class StoredBox:
    """One box of a tensor on disk: entry `key` of the safetensors file `file`, with the CRC-32 of its bytes."""

    box: Box
    file: str
    key: str
    crc32: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: full shape, element type and the boxes that together cover it exactly once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[StoredBox, ...]


@dataclass(frozen=True)
class StoredFile:
    """A document beside the tensors: its size and the CRC-32 of its bytes."""

    size_bytes: int
    crc32: int


@dataclass(frozen=True)
class Index:
    """Everything a checkpoint holds: `files` maps each tensor file to its size in bytes."""

    step: int
    tensors: dict[str, StoredTensor]
    files: dict[str, int]
    documents: dict[str, StoredFile]

    def to_json(self) -> str:
        """The text of `index.json`, its own checksum included."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": self.files,
            "documents": {
                name: {"size_bytes": f.size_bytes, "crc32": _hex(f.crc32)} for name, f in self.documents.items()
            },
            "tensors": {name: _tensor_to_json(tensor) for name, tensor in self.tensors.items()},
        }
        return json.dumps({"crc32": _hex(_checksum(body)), **body}, indent=1)

    def problems(self) -> list[str]:
        """What keeps the boxes from being the tensors: gaps, overlaps, and entries of files that two boxes claim."""
        found = []
        owners: dict[tuple[str, str], str] = {}
        for name, tensor in self.tensors.items():
            problem = cover_problem(tensor.shape, [stored.box for stored in tensor.boxes])
            if problem is not None:
                found.append(f"tensor {name} is not whole: {problem}")
                continue
            for stored in tensor.boxes:
                owner = owners.setdefault((stored.file, stored.key), name)
                if owner is not name:
                    found.append(f"the entry {stored.key} of {stored.file} stands for {owner} and {name}")
        return found

    @classmethod
    def from_json(cls, text: str, path: Path) -> Index:
        """Read the text of an `index.json`; `path` is for the message.

        Whether the boxes cover their tensors is left to `problems`.

        Raises:
            CheckpointError: not JSON, not this format, a version from the future, a checksum that disagrees, a field
                of another type, a file outside the checkpoint, or a box outside its tensor.
        """
        try:
            body = parse_object(text)
            claimed = body.pop("crc32")
            known = body["format"] == FORMAT and body["version"] == VERSION
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not the index of a checkpoint ({error}); load an earlier one with --ckpt-step"
            ) from error
        if not known:
            raise CheckpointError(
                f"{path} says format {body.get('format')} version {body.get('version')}, "
                f"this program reads {FORMAT} version {VERSION}; use the program version that wrote it"
            )
        if claimed != _hex(_checksum(body)):
            raise CheckpointError(
                f"{path} is damaged: checksum {_hex(_checksum(body))} of its contents, it says {claimed}; "
                "load an earlier checkpoint with --ckpt-step"
            )
        try:
            return _index_from_json(Fields(body, "the index"))
        except ValueError as error:
            raise CheckpointError(
                f"{path} describes no checkpoint: {error}; load an earlier one with --ckpt-step"
            ) from error


def read_index(directory: Path) -> Index:
    """Read the index of the checkpoint in `directory`.

    Raises:
        CheckpointError: there is no index, it cannot be read, it is damaged, or its boxes do not cover their tensors:
            a load would leave the rest of them as it was.
    """
    index = parse_index(directory)
    if problems := index.problems():
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"{directory / INDEX_NAME} describes no whole checkpoint: {'; '.join(problems[:_LISTED])}{more}; load an "
            "earlier one with --ckpt-step"
        )
    return index


def parse_index(directory: Path) -> Index:
    """The index in `directory` as it is, for those who list what is wrong with it.

    Raises:
        CheckpointError: there is no index, it cannot be read or it is damaged.
    """
    path = directory / INDEX_NAME
    try:
        text = read_regular(path).decode()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} is not a checkpoint: it has no {INDEX_NAME}; give the directory that --save wrote"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); load an earlier one with --ckpt-step") from error
    return Index.from_json(text, path)


def write_index(directory: Path, index: Index) -> None:
    """Write `index.json`, which makes a directory whose other files are on the disk a checkpoint.

    Raises:
        StorageError: the file system refused.
    """
    with storage_errors(directory / INDEX_NAME):
        write_file(directory / INDEX_NAME, [index.to_json().encode()])


def document_text(document: dict[str, Any]) -> bytes:
    """What a document's file holds."""
    return json.dumps(document, indent=1).encode()


def box_key(name: str, offset: tuple[int, ...]) -> str:
    """Name of a box inside a safetensors file: `model/embedding.word.weight@128,0`."""
    return f"{name}@{','.join(map(str, offset))}"


def _hex(checksum: int) -> str:
    return f"{checksum:08x}"


def _checksum(body: dict[str, Any]) -> int:
    # Over a canonical form, so that reformatting the file does not count as damage.
    return crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _tensor_to_json(tensor: StoredTensor) -> dict[str, Any]:
    boxes = [
        {"offset": s.box.offset, "size": s.box.size, "file": s.file, "key": s.key, "crc32": _hex(s.crc32)}
        for s in tensor.boxes
    ]
    return {"shape": tensor.shape, "dtype": str(tensor.dtype).removeprefix("torch."), "boxes": boxes}


def _index_from_json(body: Fields) -> Index:
    """The values of a whole index. Raises: ValueError for the first that cannot be what it stands for."""
    files = {_file_name(name): size for name, size in body.entries("files").items()}
    sizes = Fields(files, "files")
    documents = body.objects("documents")
    return Index(
        step=body.integer("step"),
        tensors={name: _tensor_from_json(name, entry, files) for name, entry in body.objects("tensors").items()},
        files={name: sizes.integer(name) for name in files},
        documents={
            _file_name(name): StoredFile(one.integer("size_bytes"), _crc32(one)) for name, one in documents.items()
        },
    )


def _tensor_from_json(name: str, entry: Fields, files: Container[str]) -> StoredTensor:
    shape, dtype = entry.integers("shape"), entry.text("dtype")
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} has the dtype {dtype!r}; known are {', '.join(DTYPES)}")
    boxes = []
    for one in entry.rows("boxes"):
        box, file = Box(one.integers("offset"), one.integers("size")), one.text("file")
        if not len(box.offset) == len(box.size) == len(shape) or any(
            offset + size > full for offset, size, full in zip(box.offset, box.size, shape)
        ):
            raise ValueError(f"tensor {name} of shape {shape} has a box of {box.size} at {box.offset}, outside of it")
        if file not in files:
            raise ValueError(f"tensor {name} has a box in {file!r}, which is none of the files")
        boxes.append(StoredBox(box, file, one.text("key"), _crc32(one)))
    return StoredTensor(shape, DTYPES[dtype], tuple(boxes))


def _file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"it names the file {name!r}, which is not the plain name of a file inside the checkpoint")
    return name


def _crc32(entry: Fields) -> int:
    text = entry.text("crc32")
    if not re.fullmatch(r"[0-9a-f]{8}", text):
        raise ValueError(f"a checksum is {text!r:.40} and must be eight hexadecimal digits")
    return int(text, 16)
